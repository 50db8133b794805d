"""New keys and values into a cache, dense or in pages, as attention_decode reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check
from llmos_fast.ops.attention_decode import check_integers, check_pages

implementations("cache_write", "native")

_OP = "cache_write"


def cache_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write the newest tokens' keys and values to their rows of the cache, in place.

    Token i of the seq new ones of sequence b stands at position p = cache_lengths[b] - seq + i,
    where ``attention_decode`` with the same arguments looks for it. Positions outside of the cache,
    and pages that do not exist, are left out. The call never waits for the device.

    Args:
        key: Float[batch heads_kv seq head_dim], any strides.
        value: Float[batch heads_kv seq head_dim_v], in key's dtype.
        key_cache: [batch heads_kv capacity head_dim], in key's dtype or int8.
        value_cache: [batch heads_kv capacity head_dim_v], in key_cache's dtype.
        cache_lengths: Int[batch], how many keys are valid, the new tokens' included.
        block_table: Int[batch max_pages] for a paged cache, as in ``attention_decode``.
        key_scale: Float32 of key_cache's first three dimensions, for int8 and only there: a row
            holds round_half_even(x (127 / amax)) and its scale becomes amax / 127 (0 and NaN where
            x is not finite), amax being the largest magnitude in the row.
        value_scale: likewise for the values.
        impl: "auto", or the name of an implementation, which is then forced.

    No gradients: where grad mode is on, no argument may require them.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    check.floating(_OP, key=key, value=value, key_scale=key_scale, value_scale=value_scale)
    check.same_dtype(_OP, key=key, value=value)
    check.require(key.dim() == 4, _OP, "key", "have 4 dimensions", tuple(key.shape))
    batch, heads, seq, head_dim = key.shape
    head_dim_v = value.shape[-1] if value.dim() == 4 else -1
    check.shape(_OP, "value", value, (batch, heads, seq, head_dim_v), "those of key and head_dim_v")
    pages, _, page_size, *_ = (*key_cache.shape, 0, 0, 0)
    rows = (batch if block_table is None else pages, heads, page_size)
    names = "batch heads_kv capacity" if block_table is None else "pages heads_kv page_size"
    for argument, cache, width, scale in (
        ("key", key_cache, head_dim, key_scale),
        ("value", value_cache, head_dim_v, value_scale),
    ):
        check.shape(_OP, f"{argument}_cache", cache, (*rows, width), f"{names} head_dim")
        _check_storage(argument, cache, scale, key)
    check.same_dtype(_OP, key_cache=key_cache, value_cache=value_cache)
    check_integers(_OP, "cache_lengths", cache_lengths, key)
    check.shape(_OP, "cache_lengths", cache_lengths, (batch,), "batch")
    if block_table is not None:
        check_pages(_OP, batch, key_cache, block_table)
    tensors = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    check.no_gradient(_OP, "use attention, or torch.no_grad", **tensors)
    select(
        _OP,
        impl,
        **tensors,
        cache_lengths=cache_lengths,
        block_table=block_table,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def _check_storage(argument: str, cache: Tensor, scale: Tensor | None, key: Tensor) -> None:
    if cache.dtype not in (key.dtype, torch.int8):
        rule = f"be {key.dtype}, as key, or int8"
        check.require(False, _OP, f"{argument}_cache", rule, cache.dtype)
    if cache.device != key.device:
        check.require(False, _OP, f"{argument}_cache", f"be on {key.device}", cache.device)
    if cache.dtype != torch.int8:
        if scale is not None:
            rule = "be given for an int8 cache only"
            check.require(False, _OP, f"{argument}_scale", rule, cache.dtype)
        return
    if scale is None:
        check.require(False, _OP, f"{argument}_scale", "be given for an int8 cache", None)
        return
    valid = scale.dtype == torch.float32
    check.require(valid, _OP, f"{argument}_scale", "be float32", scale.dtype)
    names = f"{argument}_cache's first three dimensions"
    check.shape(_OP, f"{argument}_scale", scale, cache.shape[:3], names)
