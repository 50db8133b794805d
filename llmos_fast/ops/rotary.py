"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check

implementations("rotary", "native")

_OP = "rotary"


def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of features by an angle that grows with the position (Su et al. 2021, RoFormer).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin). Pair i is (i, i + rotary_dim / 2), or
    (2 i, 2 i + 1) where ``interleaved``. Features from rotary_dim on pass through unchanged.

    Args:
        query: Float[batch heads_q seq head_dim], any strides.
        key: Float[batch heads_kv seq head_dim], any strides.
        cos: Float[seq rotary_dim / 2] or Float[batch seq rotary_dim / 2]: one angle per pair.
        sin: as ``cos``.
        interleaved: which features form a pair.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Rotated (query, key), each in its own shape and dtype.

    Gradients: query, key.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    check.floating(_OP, query=query, key=key, cos=cos, sin=sin)
    for argument, tensor in (("query", query), ("key", key)):
        check.require(tensor.dim() == 4, _OP, argument, "have 4 dimensions", tuple(tensor.shape))
    batch, _, seq, head_dim = query.shape
    expected = (batch, key.shape[1], seq, head_dim)
    check.shape(_OP, "key", key, expected, "batch heads_kv seq head_dim")
    check.require(cos.dim() in (2, 3), _OP, "cos", "have 2 or 3 dimensions", tuple(cos.shape))
    half = cos.shape[-1]
    rule = f"be at most head_dim / 2 = {head_dim / 2}"
    check.require(2 * half <= head_dim, _OP, "last dimension of cos", rule, half)
    angles = (seq, half) if cos.dim() == 2 else (batch, seq, half)
    check.shape(_OP, "cos", cos, angles, "[batch] seq rotary_dim/2")
    check.shape(_OP, "sin", sin, cos.shape, "that of cos")
    return select(  # type: ignore[no-any-return]
        _OP, impl, query=query, key=key, cos=cos, sin=sin, interleaved=interleaved
    )
