"""What the attention kernels are given, in a few tuples; a feature that is off is None.

Triton compiles None and the number 1 into a kernel, so a feature costs nothing where it is off and
a last stride of 1 is known to be one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .philox import Dropout, dropout_numbers
from .runtime import contiguous


class Rows(NamedTuple):
    """A tensor [batch heads rows columns] by its strides; packed sequences have no batch stride."""

    ptr: Tensor
    batch_stride: int
    head_stride: int
    row_stride: int
    column_stride: int


class Plane(NamedTuple):
    """A mask or bias that broadcasts to the scores; a broadcast row or column has stride None."""

    ptr: Tensor
    batch_stride: int
    head_stride: int
    row_stride: int | None
    column_stride: int | None


class Sequences(NamedTuple):
    """How many rows there are, and where each sequence begins and ends among them.

    Attributes:
        rows_q: seq_q, or the rows of all packed queries.
        rows_k: likewise.
        heads_q: query heads.
        group: query heads that share a key head.
        key_lengths: Int[batch] or None.
        cu_q: Int[sequences + 1], where sequences are packed.
        cu_k: likewise.
        bottom_right: 1 where queries are aligned with the last keys, or None.
    """

    rows_q: int
    rows_k: int
    heads_q: int
    group: int
    key_lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    bottom_right: int | None


class Scores(NamedTuple):
    """What happens between the two products. Causal attention is a window with right = 0.

    Attributes:
        scale: of the product of query and key.
        softcap: or None.
        left: keys further before the query's position are hidden; None is open.
        right: likewise after it.
        mask: UInt8, 0 is hidden.
        bias: added to the scores.
        alibi: Float32[heads_q] or [batch heads_q].
        alibi_batch_stride: of ``alibi``.
        sinks: Float[heads_q].
        dropout: or None.
        folds: 1 where base-2 scores are the product times one positive number, or None.
        masked: 1 where there is a mask, or None; triton 3.6 compares no tuple that has None in it.
        biased: likewise.
    """

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    mask: Plane | None
    bias: Plane | None
    alibi: Tensor | None
    alibi_batch_stride: int
    sinks: Tensor | None
    dropout: Dropout | None
    folds: int | None
    masked: int | None = None
    biased: int | None = None


def rows(x: Tensor) -> Rows:
    """Strides of [batch heads rows columns], or of packed [rows heads columns]."""
    if x.dim() == 4:
        return Rows(x, *x.stride())
    row, head, column = x.stride()
    return Rows(x, 0, head, row, column)


def plane(x: Tensor | None, scores: tuple[int, ...]) -> Plane | None:
    """``x`` broadcast to the shape of the scores."""
    if x is None:
        return None
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    batch, head, row, column = x.expand(scores).stride()
    sizes = (1, 1, *x.shape)[-2:]
    return Plane(x, batch, head, row if sizes[0] > 1 else None, column if sizes[1] > 1 else None)


class Arguments(NamedTuple):
    """The arguments of the registered ops, in their order."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    causal: str
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    seed: Tensor | None
    scale: float

    @property
    def packed(self) -> bool:
        """Sequences are rows of one long one."""
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        """Sequences."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q.numel() - 1
        return self.query.shape[0]

    @property
    def heads(self) -> tuple[int, int]:
        """(heads_q, heads_kv)."""
        return self.query.shape[1], self.key.shape[1]

    @property
    def longest(self) -> tuple[int, int]:
        """(queries, keys) of the longest sequence."""
        if self.packed:
            # what the caller says of his sequences may be too much
            return (
                min(self.max_seqlen_q, self.query.shape[0]),
                min(self.max_seqlen_k, self.key.shape[0]),
            )
        return self.query.shape[2], self.key.shape[2]

    @property
    def scores_shape(self) -> tuple[int, ...]:
        """[batch heads_q seq_q seq_k]."""
        return (self.batch, self.heads[0], *self.longest)

    def sequences(self) -> Sequences:
        """Where sequences begin and end."""
        dimension = 0 if self.packed else 2
        heads_q, heads_kv = self.heads
        return Sequences(
            self.query.shape[dimension],
            self.key.shape[dimension],
            heads_q,
            heads_q // max(heads_kv, 1),
            contiguous(self.key_lengths),
            contiguous(self.cu_seqlens_q),
            contiguous(self.cu_seqlens_k),
            1 if self.causal == "bottom_right" else None,
        )

    def scores(self) -> Scores:
        """What happens between the two products."""
        left, right = self.window_left, self.window_right
        right = 0 if self.causal else right
        alibi = None if self.alibi_slopes is None else self.alibi_slopes.float().contiguous()
        plain = self.softcap == 0 and self.bias is None and alibi is None and self.scale > 0
        return Scores(
            self.scale,
            self.softcap or None,
            left if left >= 0 else None,
            right if right >= 0 else None,
            plane(self.mask, self.scores_shape),
            plane(self.bias, self.scores_shape),
            alibi,
            self.heads[0] if alibi is not None and alibi.dim() == 2 else 0,
            contiguous(self.sinks),
            dropout_numbers(self.seed, self.dropout_p),
            1 if plain else None,
            None if self.mask is None else 1,
            None if self.bias is None else 1,
        )
