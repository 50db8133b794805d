"""cache_write on the CPU: csrc/cpu/cache_write.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.library import register
from llmos_fast.native.common import _C, contiguous, refusal, rows_contiguous


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
    _C.cache_write(
        rows_contiguous(key),
        rows_contiguous(value),
        key_cache,
        value_cache,
        cache_lengths.contiguous(),
        contiguous(block_table),
        key_scale,
        value_scale,
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
