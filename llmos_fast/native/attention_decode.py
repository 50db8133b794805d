"""attention_decode on the CPU: csrc/cpu/attention_decode.inl."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llmos_fast.library import register
from llmos_fast.native.common import _C, contiguous, refusal, rows_contiguous


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


def _row_scale(scale: Tensor | None, cache: Tensor) -> Tensor | None:
    """In fp32, seen as [pages heads_kv rows]."""
    return None if scale is None else scale.detach().float().expand(cache.shape[:3])


def _empty_out(query: Tensor, value_cache: Tensor) -> Tensor:
    """[batch heads_q seq_q head_dim_v] with heads inside rows, as the next product reads it."""
    batch, heads, seq, _ = query.shape
    width = value_cache.shape[3]
    strides = (seq * heads * width, width, heads * width, 1)
    return query.new_empty_strided((batch, heads, seq, width), strides)


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
    keys, values = rows_contiguous(key_cache), rows_contiguous(value_cache)
    if cache_lengths is None:
        cache_lengths = _full_lengths(keys.shape[0], keys.shape[2])
    out = _empty_out(query, values)
    _C.attention_decode(
        rows_contiguous(query),
        keys,
        values,
        cache_lengths.contiguous(),
        contiguous(block_table),
        _row_scale(key_scale, keys),
        _row_scale(value_scale, values),
        _vector(alibi_slopes),
        _vector(sinks),
        out,
        scale,
        window_left,
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
