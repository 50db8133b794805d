"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check

implementations("rotary", "native", "triton")

_OP = "rotary"
INDEX_DTYPES = (torch.int32, torch.int64)


def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of features by an angle that grows with the position (Su et al. 2021, RoFormer).

    The pair (a, b) becomes (a cos - b sin, b cos + a sin). Pair i is (i, i + rotary_dim / 2), or
    (2 i, 2 i + 1) where ``interleaved``. Features from rotary_dim on pass through unchanged.

    Args:
        query: Float[batch heads_q seq head_dim], any strides.
        key: Float[batch heads_kv seq head_dim], any strides.
        cos: Float[seq rotary_dim / 2] or Float[batch seq rotary_dim / 2]: one angle per pair; with
            ``positions`` a table, Float[max_positions rotary_dim / 2].
        sin: as ``cos``.
        interleaved: which features form a pair.
        positions: Int32 or Int64, [seq] or [batch seq]: row of the table for each token, or None.
        inplace: overwrite query and key, which need no gradient, and return them.
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
    if positions is not None:
        _check_positions(positions, cos, batch, seq)
    rule = f"be at most head_dim / 2 = {head_dim / 2}"
    check.require(2 * half <= head_dim, _OP, "last dimension of cos", rule, half)
    if positions is None:
        angles = (seq, half) if cos.dim() == 2 else (batch, seq, half)
        check.shape(_OP, "cos", cos, angles, "[batch] seq rotary_dim/2")
    check.shape(_OP, "sin", sin, cos.shape, "that of cos")
    if inplace:
        _check_inplace(query, key)
    return select(  # type: ignore[no-any-return]
        _OP,
        impl,
        query=query,
        key=key,
        cos=cos,
        sin=sin,
        interleaved=interleaved,
        positions=positions,
        inplace=inplace,
    )


def _check_positions(positions: Tensor, cos: Tensor, batch: int, seq: int) -> None:
    rule = "be int32 or int64"
    check.require(positions.dtype in INDEX_DTYPES, _OP, "positions", rule, positions.dtype)
    shape = (seq,) if positions.dim() == 1 else (batch, seq)
    check.shape(_OP, "positions", positions, shape, "[batch] seq")
    rule = "have 2 dimensions beside positions"
    check.require(cos.dim() == 2, _OP, "cos", rule, tuple(cos.shape))
    readable = cos.shape[0] > 0 or positions.numel() == 0
    check.require(readable, _OP, "cos", "have a row for positions", tuple(cos.shape))


def _check_inplace(query: Tensor, key: Tensor) -> None:
    for argument, x in (("query", query), ("key", key)):
        needed = torch.is_grad_enabled() and x.requires_grad
        check.require(not needed, _OP, argument, "need no gradient with inplace", "requires_grad")
        overlaps = any(
            size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)
        )
        rule = "have elements of its own in memory with inplace"
        check.require(not overlaps, _OP, argument, rule, f"strides {x.stride()}")
    shared = query is key or (not torch.compiler.is_compiling() and _share_elements(query, key))
    rule = "have no element in common with query with inplace"
    check.require(not shared, _OP, "key", rule, "overlapping memory")


def _share_elements(query: Tensor, key: Tensor) -> bool:
    """Of views of one storage with the same strides, such as slices of a packed projection."""
    alias: bool = torch._C._is_alias_of(query, key)  # type: ignore[attr-defined]
    if query.dtype != key.dtype or not alias:
        return False
    if query.numel() == 0 or key.numel() == 0:
        return False
    dims = []
    for q, k, step_q, step_k in zip(
        query.shape, key.shape, query.stride(), key.stride(), strict=True
    ):
        if q > 1 and k > 1 and step_q != step_k:
            return False
        if q > 1 or k > 1:
            dims.append((step_q if q > 1 else step_k, q, k))
    distance = int(key.storage_offset() - query.storage_offset())
    return _meet(distance, sorted(dims, reverse=True))


def _meet(distance: int, dims: list[tuple[int, int, int]]) -> bool:
    """Whether ``distance`` is a sum of (i_q - i_k) * step over (step, size_q, size_k) in dims."""
    if not dims:
        return distance == 0
    (step, q, k), *rest = dims
    # the smaller steps together reach less far than this one
    nearest = (distance // step, distance // step + 1)
    return any(-k < n < q and _meet(distance - n * step, rest) for n in nearest)
