"""How the dimensions of activations are arranged, and heads as views of them."""

from __future__ import annotations

from torch import Tensor

# [batch seq features], [seq batch features], [seq features], [total features]
BATCH_FIRST, SEQ_FIRST, UNBATCHED, PACKED = "batch_first", "seq_first", "unbatched", "packed"


def layout_of(x: Tensor, batch_first: bool) -> str:
    """How the dimensions of a layer's input are arranged."""
    if x.dim() == 2:
        return UNBATCHED
    return BATCH_FIRST if batch_first else SEQ_FIRST


def seq_dim(layout: str) -> int:
    """Which dimension counts positions."""
    return 1 if layout == BATCH_FIRST else 0


def batch_and_length(x: Tensor, layout: str) -> tuple[int | None, int]:
    """Sizes of both dimensions; no batch is None."""
    if layout == BATCH_FIRST:
        return x.shape[0], x.shape[1]
    if layout == SEQ_FIRST:
        return x.shape[1], x.shape[0]
    return None, x.shape[0]


def to_heads(x: Tensor, heads: int, layout: str) -> Tensor:
    """A view [batch heads seq head_dim] (packed: [total heads head_dim]) of [... features]."""
    x = x.view(*x.shape[:-1], heads, x.shape[-1] // heads)
    if layout == BATCH_FIRST:
        return x.transpose(1, 2)
    if layout == SEQ_FIRST:
        return x.permute(1, 2, 0, 3)
    return x if layout == PACKED else x.transpose(0, 1).unsqueeze(0)


def from_heads(heads: Tensor, layout: str) -> Tensor:
    """The inverse of ``to_heads``, a copy where the memory is laid out otherwise."""
    if layout == BATCH_FIRST:
        return heads.transpose(1, 2).flatten(2)
    if layout == SEQ_FIRST:
        return heads.permute(2, 0, 1, 3).flatten(2)
    return (heads if layout == PACKED else heads.squeeze(0).transpose(0, 1)).flatten(1)
