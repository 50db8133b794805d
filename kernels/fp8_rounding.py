"""Activations rounded to e4m3 on the GPU: a scale for each row, or for each 128 columns of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.formats import FP8_MAX

from .launch import unless_forced
from .matrix import load_tile, matrix, store_tile
from .runtime import launch, wide

_MAX = tl.constexpr(FP8_MAX)


@dataclass(frozen=True)
class RoundingLaunch:
    """Rows of a program, and columns that it takes at a time."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int


@triton.jit
def round_groups(
    x, levels, scales, m_size, k_size, group_size, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One group of BLOCK_M rows; the second time its columns come from the cache.

    A maximum passes over NaN, whose level is NaN all the same.
    """
    m = tl.program_id(0) * BLOCK_M
    group = tl.program_id(1)
    first = group * group_size
    last = tl.minimum(first + group_size, k_size)
    amax = tl.full([BLOCK_M], 1e-30, tl.float32)
    for k in tl.range(first, last, BLOCK_K):
        tile = load_tile(x.ptr, x, m, k, m_size, last, BLOCK_M, BLOCK_K, False).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(tile), axis=1))
    inverse = tl.div_rn(_MAX, amax)
    for k in tl.range(first, last, BLOCK_K):
        tile = load_tile(x.ptr, x, m, k, m_size, last, BLOCK_M, BLOCK_K, False).to(tl.float32)
        store_tile(tile * inverse[:, None], levels, m, k, m_size, last, BLOCK_M, BLOCK_K)
    r = m + tl.arange(0, BLOCK_M)
    tl.store(scales + wide(group) * m_size + r, tl.div_rn(amax, _MAX), mask=r < m_size)


def round_to_fp8(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """(e4m3 [m k], scales Float32[groups m]) of x [m k], as ``ops.quant_matmul`` defines them."""
    m_size, k_size = x.shape
    groups = triton.cdiv(k_size, group_size)
    levels = x.new_empty(m_size, k_size, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(groups, m_size, dtype=torch.float32)
    config = unless_forced("round_groups", _choose(group_size))
    launch(
        round_groups,
        (triton.cdiv(m_size, config.BLOCK_M), groups),
        x.device,
        x=matrix(x),
        levels=matrix(levels),
        scales=scales,
        m_size=m_size,
        k_size=k_size,
        group_size=group_size,
        **asdict(config),
    )
    return levels, scales


def _choose(group_size: int) -> RoundingLaunch:
    """16 numbers of a thread at a time, or a short row."""
    columns = min(int(triton.next_power_of_2(group_size)), 4096)
    return RoundingLaunch(max(1, 2048 // columns), columns, 4 if columns <= 2048 else 8)
