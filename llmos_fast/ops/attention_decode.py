"""Attention of a sequence's newest tokens to a cache of keys and values, dense or in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check

implementations("attention_decode", "native", "triton")

INTEGERS = (torch.int32, torch.int64)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
PAGE_MULTIPLE = 16

_OP = "attention_decode"


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``ops.attention`` with causal="bottom_right" for generation: few queries, a long cache.

    The queries are the last seq_q positions of their sequence: query i of sequence b stands at
    position p = cache_lengths[b] - seq_q + i, may attend to the keys 0..p, and gives 0 where there
    is none (p < 0). Scores, softcap, ALiBi and sinks are those of ``ops.attention``. The call never
    waits for the device, so that it can be captured in a CUDA graph and replayed while the values
    of ``cache_lengths`` and ``block_table`` change.

    Args:
        query: Float[batch heads_q seq_q head_dim], any strides.
        key_cache: [batch heads_kv capacity head_dim], any strides, in query's dtype, int8 or
            float8_e4m3fn; heads_q is a multiple of heads_kv, as in ``ops.attention``. The new
            tokens' keys are already in it. Rows from cache_lengths[b] on may hold anything.
        value_cache: [batch heads_kv capacity head_dim_v], in key_cache's dtype.
        cache_lengths: Int[batch], how many keys are valid, the new tokens' included; values
            outside of [0, capacity] are clamped.
        block_table: Int[batch max_pages] for a paged cache (Kwon et al. 2023): the caches are then
            [pages heads_kv page_size head_dim], and key t of sequence b is row t % page_size of
            page block_table[b, t // page_size]; page_size is a multiple of 16 and capacity is
            max_pages page_size. Page numbers outside of [0, pages) are clamped; those of pages past
            the length may hold anything.
        scale: default head_dim ** -0.5.
        window: (left, right): keys farther than that from the query's position are hidden; -1
            leaves a side open.
        softcap: tanh limit of the scores; 0 switches it off.
        sinks: Float[heads_q], one more logit per head that takes probability and gives no value.
        alibi_slopes: Float[heads_q] or Float[batch heads_q].
        key_scale: Float, broadcastable to key_cache's first three dimensions (per tensor, per head,
            per head and token): the key is key_cache key_scale. Required for int8.
        value_scale: likewise for the values.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[batch heads_q seq_q head_dim_v] in query's dtype.

    No gradients: where grad mode is on, no argument may require them (train with
    ``ops.attention``). Under autocast query is cast as in ``ops.attention``, the caches are not.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    (query,) = check.autocast(query)  # type: ignore[assignment]
    check.floating(
        _OP,
        query=query,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    _check_caches(query, key_cache, value_cache, paged=block_table is not None)
    check_integers(_OP, "cache_lengths", cache_lengths, query)
    check.shape(_OP, "cache_lengths", cache_lengths, query.shape[:1], "batch")
    if block_table is not None:
        check_pages(_OP, query.shape[0], key_cache, block_table)
    _check_scale("key_scale", key_scale, "key_cache", key_cache)
    _check_scale("value_scale", value_scale, "value_cache", value_cache)
    batch, heads_q = query.shape[:2]
    check.shape(_OP, "sinks", sinks, (heads_q,), "heads_q")
    if alibi_slopes is not None and alibi_slopes.shape != (heads_q,):
        check.shape(_OP, "alibi_slopes", alibi_slopes, (batch, heads_q), "batch heads_q")
    check.require(softcap >= 0.0, _OP, "softcap", "be at least 0", softcap)
    left, right = (-1, -1) if window is None else window
    rule = "have sides of -1 (open) or more"
    check.require(left >= -1 and right >= -1, _OP, "window", rule, window)
    check.no_gradient(
        _OP,
        "use attention, or torch.no_grad",
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    return select(  # type: ignore[no-any-return]
        _OP,
        impl,
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        cache_lengths=cache_lengths,
        block_table=block_table,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=(left, right),
        softcap=float(softcap),
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def _check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor, *, paged: bool) -> None:
    # keys and values push this code out of the CPU's caches between two calls: what valid ones do
    # not need, such as sentences, stands where it is needed
    device, dtype = query.device, key_cache.dtype
    tensors = (("query", query), ("key_cache", key_cache), ("value_cache", value_cache))
    for argument, tensor in tensors:
        if tensor.dim() != 4:
            check.require(False, _OP, argument, "have 4 dimensions", tuple(tensor.shape))
        if tensor.device != device:
            check.require(False, _OP, argument, f"be on {device}, as query", tensor.device)
    if dtype != query.dtype and dtype not in QUANTIZED:
        rule = f"have the dtype of query, {query.dtype}, or be int8 or float8_e4m3fn"
        check.require(False, _OP, "key_cache", rule, dtype)
    if value_cache.dtype != dtype:
        check.same_dtype(_OP, key_cache=key_cache, value_cache=value_cache)
    batch, heads_q, _, head_dim = query.shape
    pages, heads_kv, rows, _ = key_cache.shape
    sizes = (pages if paged else batch, heads_kv, rows)
    head_dim_v = value_cache.shape[3]
    if key_cache.shape != (*sizes, head_dim) or value_cache.shape != (*sizes, head_dim_v):
        names = "pages heads_kv page_size" if paged else "batch heads_kv capacity"
        check.shape(_OP, "key_cache", key_cache, (*sizes, head_dim), f"{names} head_dim")
        check.shape(_OP, "value_cache", value_cache, (*sizes, head_dim_v), f"{names} head_dim_v")
    if heads_q % heads_kv if heads_kv else heads_q:
        rule = "be a multiple of the cache's heads"
        check.require(False, _OP, "heads of query", rule, f"{heads_q} and {heads_kv}")


def check_pages(op: str, batch: int, key_cache: Tensor, block_table: Tensor) -> None:
    """``block_table`` and the pages' sizes are such as the kernels take."""
    check_integers(op, "block_table", block_table, key_cache)
    valid = block_table.dim() == 2 and block_table.shape[0] == batch
    rule = f"have shape (batch max_pages) = ({batch}, any)"
    check.require(valid, op, "block_table", rule, tuple(block_table.shape))
    pages, _, page_size, _ = key_cache.shape
    check.require(pages > 0, op, "key_cache", "have at least one page", tuple(key_cache.shape))
    valid = page_size > 0 and page_size % PAGE_MULTIPLE == 0
    check.require(valid, op, "page_size", f"be a multiple of {PAGE_MULTIPLE}", page_size)


def check_integers(op: str, argument: str, tensor: Tensor, beside: Tensor) -> None:
    """``tensor`` holds int32 or int64, on the device of ``beside``."""
    if tensor.dtype not in INTEGERS:
        check.require(False, op, argument, "be int32 or int64", tensor.dtype)
    if tensor.device != beside.device:
        check.require(False, op, argument, f"be on {beside.device}, as query", tensor.device)


def _check_scale(argument: str, scale: Tensor | None, owner: str, cache: Tensor) -> None:
    if scale is None:
        if cache.dtype == torch.int8:
            check.require(False, _OP, argument, f"be given where {owner} is int8", None)
        return
    rows = tuple(cache.shape[:3])
    broadcasts = scale.dim() <= 3 and all(
        have in (1, want) for have, want in zip(reversed(scale.shape), reversed(rows), strict=False)
    )
    if not broadcasts:
        rule = f"broadcast to {owner}'s first three dimensions, {rows}"
        check.require(False, _OP, argument, rule, tuple(scale.shape))
