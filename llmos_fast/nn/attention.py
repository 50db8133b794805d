"""Multi-head attention: parameters, projections and heads around ops.attention."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.nn import masks as masking
from llmos_fast.nn import plain
from llmos_fast.nn.cache import LayerCache
from llmos_fast.nn.layout import UNBATCHED, batch_and_length, from_heads, layout_of, to_heads
from llmos_fast.nn.masks import Given, Masks
from llmos_fast.nn.positions import rotary_tables


class QuantizeWeight(Protocol):
    """Makes a callable module of a weight [out_features in_features] and a bias."""

    def __call__(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module: ...  # noqa: D102


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on the kernels of llmos_fast.

    Constructor, ``forward``, parameters, initialisation and ``state_dict`` are torch.nn's. Beyond
    it: a query that may attend to nothing gives zeros (before the output projection) and zero
    weights, never NaN; boolean and floating-point masks mix; ``is_causal=True`` needs no mask.

    Args:
        embed_dim: features of queries and outputs.
        num_heads: divides ``embed_dim``.
        dropout: of attention probabilities, in training.
        bias: of the projections.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and value of zeros.
        kdim: features of keys, default ``embed_dim``.
        vdim: features of values, default ``embed_dim``.
        batch_first: inputs are [batch seq features] instead of [seq batch features].
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: heads of keys and values, a divisor of ``num_heads`` (Ainslie et al. 2023,
            GQA); the rows of the key and value projections shrink accordingly.
        rotary: rotate queries and keys by their positions; a number is the base, True is 10000.
        window: (left, right), how far a query sees; -1 leaves a side open.

    Raises:
        ValueError: naming class, argument, rule and value.
    """

    num_kv_heads: int | None = None
    rotary_base: float | None = None
    window: tuple[int, int] | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary: bool | float = False,
        window: tuple[int, int] | None = None,
    ):
        if num_heads > 0 and embed_dim % num_heads != 0:
            raise ValueError(
                f"MultiheadAttention: embed_dim must be a multiple of num_heads = {num_heads}, "
                f"got {embed_dim}"
            )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        self.extend(num_kv_heads, rotary, window)

    def extend(
        self,
        num_kv_heads: int | None = None,
        rotary: bool | float = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        """Switch on options that torch.nn does not have; fewer heads_kv draw new projections."""
        if num_kv_heads not in (None, self.num_heads):
            self._reduce_kv_heads(num_kv_heads)
        if rotary:
            if self.head_dim % 2 != 0:
                raise ValueError(
                    f"MultiheadAttention: head_dim must be even for rotary, got {self.head_dim}"
                )
            self.rotary_base = 10000.0 if rotary is True else float(rotary)
        if window is not None:
            self.window = window

    def _reduce_kv_heads(self, num_kv_heads: int) -> None:
        if num_kv_heads < 1 or self.num_heads % num_kv_heads != 0:
            raise ValueError(
                f"MultiheadAttention: num_kv_heads must divide num_heads = {self.num_heads}, "
                f"got {num_kv_heads}"
            )
        self.num_kv_heads = num_kv_heads
        kv_dim = num_kv_heads * self.head_dim
        rows = {
            "in_proj_weight": self.embed_dim + 2 * kv_dim,
            "in_proj_bias": self.embed_dim + 2 * kv_dim,
            "k_proj_weight": kv_dim,
            "v_proj_weight": kv_dim,
        }
        for name, count in rows.items():
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(old.new_empty(count, *old.shape[1:])))
        for name in ("bias_k", "bias_v"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(old.new_empty(1, 1, kv_dim)))
        self._reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: Float[batch seq_q embed_dim], [seq_q batch embed_dim] or [seq_q embed_dim].
            key: Float[batch seq_k kdim], likewise.
            value: Float[batch seq_k vdim], likewise.
            key_padding_mask: [batch seq_k] (or [seq_k]) with cached keys counted; bool, True =
                hidden, or floating point, added to the scores.
            need_weights: also return the attention probabilities; costs their memory, and on a CPU
                that of all heads.
            attn_mask: [seq_q seq_k] or [batch*num_heads seq_q seq_k], bool or floating point.
            average_attn_weights: return their mean over the heads.
            is_causal: hide the keys after each query; takes the place of ``attn_mask``.
            cache: keys and values of earlier positions; the new ones are kept in it, and no query
                attends to a key after its own.

        Returns:
            (output, weights): the shape of ``query``; [batch seq_q seq_k], or
            [batch num_heads seq_q seq_k] without the mean, or None.

        Raises:
            ValueError: naming class, argument, rule and value.
        """
        if query.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        self._check_inputs(query, key, value)
        layout = layout_of(query, self.batch_first)
        masks = self.resolve(
            query, key, Given(attn_mask, key_padding_mask, is_causal), layout, cache
        )
        q, k, v = self._project(query, key, value, layout)
        if self.rotary_base is not None:
            q, k = self._rotate(q, k, masks, cache)
        if cache is not None:
            k, v = cache.append(k, v)
        if not need_weights:
            return self._output(self._attend(q, k, v, masks), layout), None
        heads, weights = self._attend_with_weights(q, k, v, masks, average_attn_weights)
        return self._output(heads, layout), weights[0] if layout == UNBATCHED else weights

    def resolve(
        self, query: Tensor, key: Tensor, given: Given, layout: str, cache: LayerCache | None = None
    ) -> Masks:
        """The masks of a call, for ``self_attention`` or ``cross_attention``."""
        seq_k = batch_and_length(key, layout)[1]
        if cache is None:
            return self.resolve_lengths(query, seq_k, given, layout)
        return self.resolve_lengths(query, cache.length + seq_k, given, layout, cached=True)

    def resolve_lengths(
        self, query: Tensor, seq_k: int, given: Given, layout: str, cached: bool = False
    ) -> Masks:
        """``resolve`` for ``seq_k`` keys, cached ones counted."""
        batch, seq_q = batch_and_length(query, layout)
        return masking.resolve(
            type(self).__name__,
            given,
            batch=batch,
            heads=self.num_heads,
            seq_q=seq_q,
            seq_k=seq_k,
            cached=cached,
        )

    def self_attention(
        self, x: Tensor, masks: Masks, layout: str, cache: LayerCache | None = None
    ) -> Tensor:
        """``forward(x, x, x)`` without weights, masks resolved, in any layout."""
        q, k, v = self._project(x, x, x, layout)
        if self.rotary_base is not None:
            q, k = self._rotate(q, k, masks, cache)
        if cache is not None:
            k, v = cache.append(k, v)
        return self._output(self._attend(q, k, v, masks), layout)

    def cross_attention(
        self,
        x: Tensor,
        memory: Tensor | None,
        masks: Masks,
        layout: str,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``forward(x, memory, memory)`` likewise; a cache keeps the memory's projections."""
        if cache is None:
            assert memory is not None
            q, k, v = self._project(x, memory, memory, layout)
        else:
            if cache.memory is None:
                assert memory is not None
                cache.keep_memory(*self._project_key_value(memory, memory, layout))
            assert cache.memory is not None
            q, (k, v) = self._project_query(x, layout), cache.memory
        return self._output(self._attend(q, k, v, masks), layout)

    def quantize_projections_(self, quantize_weight: QuantizeWeight) -> None:
        """Put ``quantize_weight(name, weight, bias)`` in the place of each input projection.

        The packed projection becomes the sub-module ``in_proj``; separate ones become ``q_proj``,
        ``k_proj`` and ``v_proj``.
        """
        if self.in_proj_weight is not None:
            self.in_proj = quantize_weight("in_proj", self.in_proj_weight, self.in_proj_bias)
        elif not self._is_packed:
            for letter, (weight, bias) in zip("qkv", self._separate_projections(), strict=True):
                name = f"{letter}_proj"
                setattr(self, name, quantize_weight(name, weight, bias))
        for name in ("in_proj_weight", "in_proj_bias", *(f"{n}_proj_weight" for n in "qkv")):
            setattr(self, name, None)

    def dequantize_projections_(self) -> None:
        """Turn what ``quantize_projections_`` made back into parameters."""
        if "in_proj" in self._modules:
            linear = self.in_proj.dequantize()  # type: ignore[operator]
            del self.in_proj
            self.in_proj_weight, self.in_proj_bias = linear.weight, linear.bias
            return
        biases = []
        for name in ("q_proj", "k_proj", "v_proj"):
            if name not in self._modules:
                return
            linear = getattr(self, name).dequantize()
            delattr(self, name)
            setattr(self, f"{name}_weight", linear.weight)
            biases.append(linear.bias)
        if biases[0] is not None:
            self.in_proj_bias = nn.Parameter(torch.cat(biases).detach())

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        expected = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        inputs = (query, key, value)
        for (argument, features), x in zip(expected.items(), inputs, strict=True):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != features:
                raise ValueError(
                    f"{type(self).__name__}: {argument} must have 2 dimensions, or 3 with a batch, "
                    f"as query, the last one of size {features}, got {tuple(x.shape)}"
                )
        batch_dim = 0 if self.batch_first else 1
        same_batch = query.dim() == 2 or query.shape[batch_dim] == key.shape[batch_dim]
        if key.shape[:-1] != value.shape[:-1] or not same_batch:
            raise ValueError(
                f"{type(self).__name__}: key must have the batch of query and the length of value, "
                f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
            )

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    @property
    def _kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, layout: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of queries, keys and values; one product where all three inputs are one."""
        if query is not key or key is not value or not self._is_packed:
            k, v = self._project_key_value(key, value, layout)
            return self._project_query(query, layout), k, v
        q, k, v = self._packed_product(query, 0, None).split(self._sizes, dim=-1)
        return (
            to_heads(q, self.num_heads, layout),
            to_heads(k, self._kv_heads, layout),
            to_heads(v, self._kv_heads, layout),
        )

    def _project_query(self, query: Tensor, layout: str) -> Tensor:
        if self._is_packed:
            return to_heads(self._packed_product(query, 0, self.embed_dim), self.num_heads, layout)
        return to_heads(self._separate_product("q", query), self.num_heads, layout)

    def _project_key_value(self, key: Tensor, value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
        embed_dim, kv_dim, _ = self._sizes
        if not self._is_packed:
            k, v = self._separate_product("k", key), self._separate_product("v", value)
        elif key is value:
            k, v = self._packed_product(key, embed_dim, None).split((kv_dim, kv_dim), dim=-1)
        else:
            k = self._packed_product(key, embed_dim, embed_dim + kv_dim)
            v = self._packed_product(value, embed_dim + kv_dim, None)
        return to_heads(k, self._kv_heads, layout), to_heads(v, self._kv_heads, layout)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Features of projected queries, keys and values."""
        kv_dim = self._kv_heads * self.head_dim
        return self.embed_dim, kv_dim, kv_dim

    @property
    def _is_packed(self) -> bool:
        return self.in_proj_weight is not None or "in_proj" in self._modules

    def _packed_product(self, x: Tensor, start: int, end: int | None) -> Tensor:
        """``x`` times rows start:end of the packed projection."""
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        if weight is None:
            # a quantized projection has no rows to take: its other columns are computed in vain
            return self.in_proj(x)[..., start:end]  # type: ignore[no-any-return]
        if start != 0 or end is not None:
            weight, bias = weight[start:end], None if bias is None else bias[start:end]
        return ops.linear(x, weight, bias)

    def _separate_projections(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Any = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split(self._sizes)
        return tuple(zip(weights, biases, strict=True))

    def _separate_product(self, name: str, x: Tensor) -> Tensor:
        quantized = self._modules.get(f"{name}_proj")
        if quantized is not None:
            return quantized(x)  # type: ignore[no-any-return]
        weight, bias = self._separate_projections()["qkv".index(name)]
        return ops.linear(x, weight, bias)

    def _rotate(
        self, q: Tensor, k: Tensor, masks: Masks, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        assert self.rotary_base is not None
        if masks.packed is not None:
            _, _, longest, _ = masks.packed.cu_seqlens
            cos, sin = rotary_tables(0, longest, self.head_dim, self.rotary_base, q.device)
            positions = masks.packed.positions
            q, k = ops.rotary(
                q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[positions], sin[positions]
            )
            return q[0].transpose(0, 1), k[0].transpose(0, 1)
        start = 0 if cache is None else cache.length
        cos, sin = rotary_tables(start, q.shape[2], self.head_dim, self.rotary_base, q.device)
        return ops.rotary(q, k, cos, sin)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> Tensor:
        k, v, masks, window = self._with_extra_keys(q, k, v, masks)
        return ops.attention(  # type: ignore[return-value]
            q,
            k,
            v,
            mask=masks.mask,
            bias=masks.bias,
            causal=masks.causal,
            key_lengths=masks.key_lengths,
            cu_seqlens=None if masks.packed is None else masks.packed.cu_seqlens,
            window=window,
            dropout_p=self._dropout_p,
        )

    def _attend_with_weights(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, average: bool
    ) -> tuple[Tensor, Tensor]:
        k, v, masks, window = self._with_extra_keys(q, k, v, masks)
        return ops.attention_weights(
            q,
            k,
            v,
            mask=masks.mask,
            bias=masks.bias,
            causal=masks.causal,
            key_lengths=masks.key_lengths,
            window=window,
            dropout_p=self._dropout_p,
            average_heads=average,
        )

    def _with_extra_keys(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks
    ) -> tuple[Tensor, Tensor, Masks, tuple[int, int] | None]:
        """``add_bias_kv`` and ``add_zero_attn`` at the end of keys and values."""
        extra = self.extra_keys
        if extra == 0:
            return k, v, masks, self.window
        masks = masking.with_extra_keys(masks, self.window, q, k.shape[2], extra)
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self._kv_heads, 1, self.head_dim)
            batch = k.shape[0]
            k = torch.cat((k, self.bias_k.to(k.dtype).view(shape).expand(batch, -1, -1, -1)), 2)
            v = torch.cat((v, self.bias_v.to(v.dtype).view(shape).expand(batch, -1, -1, -1)), 2)
        if self.add_zero_attn:
            k, v = nn.functional.pad(k, (0, 0, 0, 1)), nn.functional.pad(v, (0, 0, 0, 1))
        return k, v, masks, None

    @property
    def extra_keys(self) -> int:
        """Keys that the module adds to those of the input."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _output(self, heads: Tensor, layout: str) -> Tensor:
        return plain.linear(self.out_proj, from_heads(heads, layout))
