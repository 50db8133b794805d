"""The definition of a write to a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(**_: object) -> None:
    """Every valid call."""


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
    batch, _, seq, _ = key.shape
    pages, _, page_size, _ = key_cache.shape
    position = cache_lengths.long()[:, None] - seq + torch.arange(seq, device=key.device)
    page = torch.arange(batch, device=key.device)[:, None].expand(batch, seq)
    capacity = page_size
    if block_table is not None:
        capacity = page_size * block_table.shape[1]
        inside = position.clamp(0, max(capacity - 1, 0))
        page = block_table.long().gather(1, inside // max(page_size, 1)) if capacity else page
    valid = (position >= 0) & (position < capacity) & (page >= 0) & (page < pages)
    if 0 in key_cache.shape[:3] or key.numel() == 0:
        return
    page, row = page.clamp(0, pages - 1), position.clamp(0, capacity - 1) % page_size
    for x, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        rows = x.detach().transpose(1, 2)
        if scale is not None:
            rows, row_scale = _rounded(rows)
            _put(scale, row_scale, page, row, valid)
        _put(cache, rows, page, row, valid)


def _put(into: Tensor, new: Tensor, page: Tensor, row: Tensor, valid: Tensor) -> None:
    """into[page, :, row] = new[batch seq heads ...] where valid, without a size that depends on it.

    What is not valid writes once more what a valid row writes; if there is none, what is there.
    """
    page, row, valid, new = page.flatten(), row.flatten(), valid.flatten(), new.flatten(0, 1)
    some = valid.int().argmax()
    source = torch.where(valid, torch.arange(len(valid), device=valid.device), some)
    page, row = page[source], row[source]
    into[page, :, row] = torch.where(valid[some], new[source].to(into.dtype), into[page, :, row])


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 rows, their scales): x is about rows * scales."""
    wide = x.float()
    amax = wide.abs().amax(-1)
    finite = amax.isfinite()
    factor = torch.where(finite & (amax > 0), 127 / amax, 0.0)
    # 0 inf = NaN
    rows = (wide * factor.unsqueeze(-1)).round().nan_to_num(0.0).to(torch.int8)
    return rows, torch.where(finite, amax / 127, torch.nan)
