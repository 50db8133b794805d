"""torch.nn.Embedding with a quantized, frozen table."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.nn.quantized_module import QuantizedModule
from llmos_fast.quantize import QuantizedWeight, empty, quantize


class QuantEmbedding(QuantizedModule):
    """Rows of a table of shape (num_embeddings, embedding_dim) in a scheme of ``quantize``.

    ids: Int[...] -> Float[... embedding_dim], the values of ``qweight.dequantize()[ids]``; only
    those rows are read. Schemes with and without "_a16" mean the same here.

    The result has the module's ``dtype``, which follows casts (``module.bfloat16()``). The table
    takes no gradient, so ``padding_idx`` is only kept for ``dequantize``. There is no ``weight``.
    The state_dict is that of ``QuantizedModule``.
    """

    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scheme: str = "int8",
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """A table of 0, to be filled by ``load_state_dict``; ``from_float`` quantizes one."""
        super().__init__()
        table = empty((num_embeddings, embedding_dim), scheme, group_size, device)
        self._fill(table, padding_idx, dtype or torch.get_default_dtype())

    def _fill(self, table: QuantizedWeight, padding_idx: int | None, dtype: torch.dtype) -> None:
        self._store(table)
        self.num_embeddings, self.embedding_dim = table.shape
        self.padding_idx = padding_idx
        self.tied: tuple[QuantLinear | QuantEmbedding, ...] = ()
        empty_like = torch.empty(0, dtype=dtype, device=table.device)
        self.register_buffer("like", empty_like, persistent=False)

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, scheme: str, group_size: int = 128, method: str = "mse"
    ) -> Self:
        """Quantize the table of ``embedding``.

        Raises ValueError for max_norm, which changes the table, for scale_grad_by_freq and sparse,
        which are about its gradient, and where ``quantize`` does.
        """
        reason = refusal(embedding)
        if reason is not None:
            raise ValueError(f"QuantEmbedding: embedding must not {reason}")
        table = quantize(embedding.weight, scheme, group_size, method)
        return cls.from_quantized(table, embedding.padding_idx, embedding.weight.dtype)

    @classmethod
    def from_quantized(
        cls,
        table: QuantizedWeight,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A module of tensors that exist; they are not copied."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._fill(table, padding_idx, dtype)
        return module

    def tie(self, other: QuantLinear | QuantEmbedding) -> None:
        """Let ``other``, such as an output projection, read this table from now on.

        They go together to other devices and through ``load_state_dict`` and ``copy.deepcopy``.
        """
        self.tied = (*self.tied, other)
        self._share()

    def _share(self) -> None:
        for other in self.tied:
            other.packed, other.scales = self.packed, self.scales
            other.zero_points = self.zero_points

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return self.like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Int[...], int32 or int64 -> Float[... embedding_dim].

        Raises as ``ops.quant_embedding``.
        """
        return ops.quant_embedding(ids, self.qweight, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An nn.Embedding with the rounded table, in ``dtype`` or else the module's."""
        table = self.qweight.dequantize(dtype or self.dtype)
        embedding = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, _weight=table
        )
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        """Shape and scheme, as printed."""
        group = f", group_size={self.group_size}" if self.group_size != self.embedding_dim else ""
        padding = f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        shape = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{shape}{padding}, scheme={self.scheme}{group}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._share()
        return self


def refusal(embedding: nn.Embedding) -> str | None:
    """What a frozen table cannot do for ``embedding``; None where it can replace it."""
    if embedding.max_norm is not None:
        return f"have max_norm, got {embedding.max_norm}"
    for option in ("scale_grad_by_freq", "sparse"):
        if getattr(embedding, option):
            return f"have {option}, got True"
    return None
