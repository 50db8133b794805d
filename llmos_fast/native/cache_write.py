"""cache_write on the CPU: csrc/cpu/cache_write.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.library import register
from llmos_fast.native.common import (
    _C,
    CACHE_CODES,
    NO_STRIDES,
    address,
    contiguous,
    dtype_code,
    refusal,
    rows_contiguous,
)


def unsupported(
    *,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    **_: object,
) -> str | None:
    """Needs CPU tensors in fp32 or bf16, a cache in that dtype or int8, its rows contiguous."""
    reason = refusal(key, value)
    if reason is None and key_cache.dtype not in (key.dtype, torch.int8):
        return f"needs a cache in {key.dtype} or int8, got {key_cache.dtype}"
    if reason is None and not all(t.stride(-1) == 1 for t in (key_cache, value_cache)):
        return f"needs contiguous rows in the cache, got strides {key_cache.stride()}"
    return reason or refusal(key_scale, value_scale)


def forward(
    *,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """See llmos_fast.ops.cache_write."""
    _cache_write(
        key, value, key_cache, value_cache, cache_lengths, block_table, key_scale, value_scale
    )


def _strides(scale: Tensor | None) -> tuple[int, ...]:
    return NO_STRIDES if scale is None else (*scale.stride(), 0)


def _write_cpu(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    key, value = rows_contiguous(key), rows_contiguous(value)
    lengths = cache_lengths.contiguous()
    table = contiguous(block_table)
    batch, heads, seq, head_dim = key.shape
    pages, _, page_size, head_dim_v = value_cache.shape
    _C.cache_write(
        key.data_ptr(),
        value.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        lengths.data_ptr(),
        lengths.dtype == torch.int64,
        address(table),
        table is not None and table.dtype == torch.int64,
        address(key_scale),
        _strides(key_scale),
        address(value_scale),
        _strides(value_scale),
        key.stride(),
        value.stride(),
        key_cache.stride(),
        value_cache.stride(),
        (batch, heads, seq, head_dim, head_dim_v),
        (pages, page_size, 1 if table is None else table.shape[1]),
        dtype_code(key.dtype),
        CACHE_CODES[key_cache.dtype],
    )


def _write_fake(*_: object) -> None:
    return


_cache_write = register(
    "cache_write(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor cache_lengths, Tensor? block_table, Tensor(c!)? key_scale, Tensor(d!)? value_scale) "
    "-> ()",
    _write_cpu,
    _write_fake,
)
