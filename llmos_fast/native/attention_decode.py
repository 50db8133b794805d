"""attention_decode on the CPU: csrc/cpu/attention_decode.inl."""

from __future__ import annotations

from functools import lru_cache

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


def unsupported(*, query: Tensor, **_: object) -> str | None:
    """Needs CPU tensors in fp32 or bf16."""
    return refusal(query)


def forward(
    *,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.attention_decode; no ``cache_lengths`` means that the caches are full."""
    return _attention_decode(  # type: ignore[no-any-return]
        query,
        key_cache,
        value_cache,
        cache_lengths,
        block_table,
        key_scale,
        value_scale,
        sinks,
        alibi_slopes,
        scale,
        window[0],
        softcap,
    )


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _row_scale(scale: Tensor | None, cache: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """(scale in fp32, its strides over page, head and row)."""
    if scale is None:
        return None, NO_STRIDES
    scale = scale.detach().float()
    return scale, (*scale.expand(cache.shape[:3]).stride(), 0)


def _empty_out(query: Tensor, value_cache: Tensor) -> Tensor:
    """[batch heads_q seq_q head_dim_v] with heads inside rows, as the next product reads it."""
    batch, heads, seq, _ = query.shape
    return query.new_empty(batch, seq, heads, value_cache.shape[-1]).transpose(1, 2)


@lru_cache(maxsize=64)
def _full_lengths(batch: int, capacity: int) -> Tensor:
    """Int64[batch], read only, so it may serve every call of that shape."""
    return torch.full((batch,), capacity)


def _forward_cpu(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    softcap: float,
) -> Tensor:
    query, keys, values = (rows_contiguous(x) for x in (query, key_cache, value_cache))
    if cache_lengths is None:
        cache_lengths = _full_lengths(keys.shape[0], keys.shape[2])
    lengths = cache_lengths.contiguous()
    table = contiguous(block_table)
    key_scale, key_scale_strides = _row_scale(key_scale, keys)
    value_scale, value_scale_strides = _row_scale(value_scale, values)
    sinks, slopes = _vector(sinks), _vector(alibi_slopes)
    out = _empty_out(query, values)
    batch, heads_q, seq_q, head_dim = query.shape
    pages, heads_kv, page_size, head_dim_v = values.shape
    per_sequence = 1 if table is None else table.shape[1]
    _C.attention_decode(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        lengths.data_ptr(),
        lengths.dtype == torch.int64,
        address(table),
        table is not None and table.dtype == torch.int64,
        address(key_scale),
        key_scale_strides,
        address(value_scale),
        value_scale_strides,
        address(slopes),
        address(sinks),
        out.data_ptr(),
        query.stride(),
        keys.stride(),
        values.stride(),
        out.stride(),
        (batch, heads_q, heads_kv, seq_q, head_dim, head_dim_v),
        (pages, page_size, per_sequence),
        slopes.shape[1] if slopes is not None and slopes.dim() == 2 else 0,
        window_left,
        dtype_code(query.dtype),
        CACHE_CODES[keys.dtype],
        scale,
        softcap,
    )
    return out


def _forward_fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> Tensor:
    return _empty_out(query, value_cache)


_attention_decode = register(
    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? cache_lengths, "
    "Tensor? block_table, Tensor? key_scale, Tensor? value_scale, Tensor? sinks, "
    "Tensor? alibi_slopes, float scale, int window_left, float softcap) -> Tensor",
    _forward_cpu,
    _forward_fake,
)
