"""The definition of attention to a cache: the cache as a dense tensor, then attention's own."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.reference import attention
from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(
    *,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.attention_decode."""
    dtype = upcast(query).dtype
    out = attention.forward(
        query=query,
        key=_dense(key_cache, key_scale, cache_lengths, block_table, dtype),
        value=_dense(value_cache, value_scale, cache_lengths, block_table, dtype),
        mask=None,
        bias=None,
        causal="bottom_right",
        key_lengths=cache_lengths,
        packed=None,
        window=window,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        dropout_p=0.0,
        seed=None,
        scale=scale,
        return_lse=False,
    )
    assert isinstance(out, Tensor)
    return out


def _dense(
    cache: Tensor,
    scale: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[batch heads_kv capacity head_dim] in ``dtype``, with zeros from each length on."""
    rows = _gather(cache.to(dtype), block_table)
    if scale is not None:
        factor = scale.to(dtype).expand(cache.shape[:3]).unsqueeze(-1)
        rows = rows * _gather(factor, block_table)
    # what lies past the length may be NaN, and 0 NaN = NaN
    past = torch.arange(rows.shape[2], device=rows.device) >= lengths.view(-1, 1, 1)
    return rows.masked_fill(past.unsqueeze(-1), 0.0)


def _gather(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """[pages heads_kv page_size d] -> [batch heads_kv capacity d]; a dense cache as it is."""
    if block_table is None:
        return cache
    pages = block_table.long().clamp(0, cache.shape[0] - 1)
    return cache[pages].transpose(1, 2).flatten(2, 3)
