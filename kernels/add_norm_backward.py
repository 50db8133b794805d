"""Gradients of add_norm: persistent programs that sum over rows in registers.

With n = (total - mean) rstd, g = d_norm weight, and m(.) the mean over a row,

    d_total += rstd (g - m(g) - n m(g n))        "rms": n = total rstd, without m(g)
    d_weight = sum over rows of d_norm n         d_bias = sum over rows of d_norm

Each program takes every n-th tile of rows and leaves one row of sums, which a second kernel adds up
in a fixed order: the gradients are the same from run to run. Rows that registers do not hold are
cut into columns, and their means are computed by a kernel of their own beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import (
    MIN_BLOCK,
    TILE_PER_WARP,
    RowsLaunch,
    drop,
    load_rows,
    row_count,
    store_rows,
)
from .launch import unless_forced
from .philox import dropout_numbers
from .runtime import architecture, contiguous, launch, programs, wide

# wider rows do not fit registers beside the sums
_MAX_BLOCK = 8192
_COLUMNS = 1024


@dataclass(frozen=True)
class BackwardLaunch:
    """How the kernel is cut into tiles; rows wider than BLOCK are cut into columns.

    Attributes:
        BLOCK_ROWS: of a tile.
        BLOCK: columns of a tile.
        STAGES: tiles that are on their way from memory, the present one included.
        num_warps: of a program.
        per_multiprocessor: programs that run at a time on each.
    """

    BLOCK_ROWS: int
    BLOCK: int
    STAGES: int
    num_warps: int
    per_multiprocessor: int


@triton.jit
def load_normalised(total, mean, rstd, r, c, rows, FEATURES: tl.constexpr):
    """(n, rstd) of a tile, [R, C] and [R, 1]."""
    scale = tl.load(rstd + r, mask=r < rows, other=0.0)
    n = load_rows(total, r, c, rows, FEATURES)
    if mean is not None:
        n -= tl.load(mean + r, mask=r < rows, other=0.0)
    return n * scale, scale


@triton.jit
def load_weight(weight, c, FEATURES: tl.constexpr):
    """Columns ``c`` of a vector in fp32; it stays in the cache, unlike the rows that pass by."""
    return tl.load(weight + c, mask=c < FEATURES, other=0.0, eviction_policy="evict_last").to(
        tl.float32
    )


@triton.jit
def add_norm_backward_means(
    d_norm, total, weight, mean, rstd, mean_g, mean_gn, rows,
    FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m(g) and m(g n) of rows wider than a tile."""
    r = wide(tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    sum_gn = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for first in range(0, FEATURES, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        g = load_rows(d_norm, r, c, rows, FEATURES)
        n, _ = load_normalised(total, mean, rstd, r, c, rows, FEATURES)
        if weight is not None:
            g *= load_weight(weight, c, FEATURES)
        sum_g += g
        sum_gn += g * n
    if mean_g is not None:
        tl.store(mean_g + r, tl.sum(sum_g, 1, keep_dims=True) / FEATURES, mask=r < rows)
    tl.store(mean_gn + r, tl.sum(sum_gn, 1, keep_dims=True) / FEATURES, mask=r < rows)


@triton.jit
def add_norm_backward(
    d_norm, d_total, total, weight, mean, rstd, mean_g, mean_gn, dropout,
    d_x, d_residual, weight_sums, bias_sums, rows,
    FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of BLOCK columns; their sums over the rows of this program.

    ``mean_gn`` is None where BLOCK columns are all of them.
    """
    first = tl.program_id(1) * BLOCK
    c = first + tl.arange(0, BLOCK)[None, :]
    if weight is not None:
        w = load_weight(weight, c, FEATURES)
    sum_weight = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        r = wide(tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        g = load_rows(d_norm, r, c, rows, FEATURES)
        n, scale = load_normalised(total, mean, rstd, r, c, rows, FEATURES)
        if weight_sums is not None:
            sum_weight += g * n
        if bias_sums is not None:
            sum_bias += g
        if weight is not None:
            g *= w
        if mean_gn is None:
            m_gn = tl.sum(g * n, 1, keep_dims=True) / FEATURES
        else:
            m_gn = tl.load(mean_gn + r, mask=r < rows, other=0.0)
        if mean is not None:
            if mean_g is None:
                g -= tl.sum(g, 1, keep_dims=True) / FEATURES
            else:
                g -= tl.load(mean_g + r, mask=r < rows, other=0.0)
        d = (g - n * m_gn) * scale
        if d_total is not None:
            d += load_rows(d_total, r, c, rows, FEATURES)
        if d_residual is not None:
            store_rows(d_residual, d, r, c, rows, FEATURES)
        if d_x is not None:
            store_rows(d_x, drop(d, dropout, r, first, BLOCK), r, c, rows, FEATURES)
    columns = first + tl.arange(0, BLOCK)
    sums = tl.program_id(0) * FEATURES + columns
    if weight_sums is not None:
        tl.store(weight_sums + sums, tl.sum(sum_weight, 0), mask=columns < FEATURES)
    if bias_sums is not None:
        tl.store(bias_sums + sums, tl.sum(sum_bias, 0), mask=columns < FEATURES)


@triton.jit
def add_norm_backward_sum(
    weight_sums, bias_sums, d_weight, d_bias, count,
    FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the ``count`` rows that add_norm_backward left."""
    first = tl.program_id(0) * BLOCK
    if weight_sums is not None:
        _store_column_sums(weight_sums, d_weight, count, first, FEATURES, BLOCK_ROWS, BLOCK)
    if bias_sums is not None:
        _store_column_sums(bias_sums, d_bias, count, first, FEATURES, BLOCK_ROWS, BLOCK)


@triton.jit
def _store_column_sums(
    sums, out, count, first,
    FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = first + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (r < count) & (c[None, :] < FEATURES)
        total += tl.load(sums + r * FEATURES + c[None, :], mask=inside, other=0.0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < FEATURES)


def choose_backward(arch: int, features: int) -> BackwardLaunch:
    """The launch for rows of ``features`` elements."""
    block = max(MIN_BLOCK, int(triton.next_power_of_2(features)))
    if arch == 0:
        return BackwardLaunch(4, min(block, 64), 2, num_warps=4, per_multiprocessor=1)
    if block > _MAX_BLOCK:
        block = _COLUMNS
    if block <= 8 * TILE_PER_WARP:
        return BackwardLaunch(8 * TILE_PER_WARP // block, block, 2, 8, per_multiprocessor=2)
    return BackwardLaunch(1, block, 2, 16, per_multiprocessor=1)


def choose_means(arch: int) -> RowsLaunch:
    """The launch for rows of any width."""
    return RowsLaunch(2, 32, num_warps=4) if arch == 0 else RowsLaunch(1, 4096, num_warps=8)


def backward(
    d_norm: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    p: float,
    seed: Tensor | None,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_x, d_residual, d_weight, d_bias); each is empty where its dtype is None."""
    gradients = empty_gradients(total, x_dtype, residual_dtype, weight_dtype, bias_dtype)
    d_x, d_residual, d_weight, d_bias = gradients
    rows, features = row_count(total), total.shape[-1]
    if features == 0:
        return gradients
    config = unless_forced(
        "add_norm_backward", choose_backward(architecture(total.device), features)
    )
    tiles, blocks = triton.cdiv(rows, config.BLOCK_ROWS), triton.cdiv(features, config.BLOCK)
    at_once = programs(total.device, tiles * blocks) * config.per_multiprocessor
    count = min(tiles, max(1, at_once // blocks))
    sums = [
        None if dtype is None else total.new_empty(count, features, dtype=torch.float32)
        for dtype in (weight_dtype, bias_dtype)
    ]
    saved = {
        "d_norm": d_norm.contiguous(),
        "total": total.contiguous(),
        "weight": contiguous(weight),
        "mean": None if rms else mean,
        "rstd": rstd,
        "rows": rows,
        "FEATURES": features,
    }
    launch(
        add_norm_backward,
        (count, blocks),
        total.device,
        **saved,
        **(_row_means(saved) if blocks > 1 else {"mean_g": None, "mean_gn": None}),
        d_total=contiguous(d_total),
        dropout=dropout_numbers(seed, p),
        d_x=None if x_dtype is None else d_x,
        d_residual=None if residual_dtype is None else d_residual,
        weight_sums=sums[0],
        bias_sums=sums[1],
        BLOCK_ROWS=config.BLOCK_ROWS,
        BLOCK=config.BLOCK,
        STAGES=config.STAGES,
        num_warps=config.num_warps,
    )
    _sum_rows(sums, [d_weight, d_bias])
    return gradients


def _row_means(saved: dict[str, Any]) -> dict[str, Tensor | None]:
    """m(g), where it is subtracted, and m(g n), Float[rows] each."""
    rstd = saved["rstd"]
    config = unless_forced("add_norm_backward_means", choose_means(architecture(rstd.device)))
    means = {
        "mean_g": None if saved["mean"] is None else torch.empty_like(rstd),
        "mean_gn": torch.empty_like(rstd),
    }
    grid = (triton.cdiv(saved["rows"], config.BLOCK_ROWS),)
    launch(add_norm_backward_means, grid, rstd.device, **saved, **means, **asdict(config))
    return means


def _sum_rows(sums: list[Tensor | None], results: list[Tensor]) -> None:
    """Fill the results, Float[features], whose rows of sums were computed."""
    known = [s for s in sums if s is not None]
    if not known:
        return
    count, features = known[0].shape
    config = RowsLaunch(128, 16, num_warps=4)
    launch(
        add_norm_backward_sum,
        (triton.cdiv(features, config.BLOCK),),
        known[0].device,
        weight_sums=sums[0],
        bias_sums=sums[1],
        d_weight=results[0],
        d_bias=results[1],
        count=count,
        FEATURES=features,
        **asdict(config),
    )


def empty_gradients(
    total: Tensor,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where ``backward`` writes to."""

    def empty(shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        return total.new_empty((0,) if dtype is None else shape, dtype=dtype)

    features = total.shape[-1:]
    return (
        empty(total.shape, x_dtype),
        empty(total.shape, residual_dtype),
        empty(features, weight_dtype),
        empty(features, bias_dtype),
    )
