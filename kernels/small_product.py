"""Products of a few rows, as decoding makes them: every weight is read once, at memory speed.

Tiles of 128 rows would leave most of the GPU idle. Here a program takes BLOCK_N columns of the
result and a part of the reduction; the parts of a tile are added up, in their order, by the block
that arrives last, which also runs the epilogue. There is no second launch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import Epilogue, finish
from .launch import unless_forced
from .matrix import BlockScales, all_fit_tma, dot_scaled, halves, load_tile, matrix
from .pair import multiply_pair
from .runtime import architecture, dot, launch, multiprocessors, product_precision, zero_counters

# rows up to which a weight is read faster than multiplied, and tiles are few
MAX_ROWS = 64


class Partials(NamedTuple):
    """What the parts of a tile leave for its last block.

    Attributes:
        acc: Float32[tiles parts BLOCK_M BLOCK_N]; Int32 of integers.
        acc_up: likewise of the product that is gated, or None.
        counters: Int32[tiles], parts that have arrived; 0 before and after a launch.
    """

    acc: Tensor
    acc_up: Tensor | None
    counters: Tensor


@dataclass(frozen=True)
class SmallLaunch:
    """Tiles [BLOCK_M, BLOCK_N] of the result, BLOCK_K of the reduction at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@triton.jit
def small_product_tiles(
    out, left, right, right_up, bias, bias_up, dropout, residual, pre, pre_up, scales, row_scales,
    blocks, partials, m_size, n_size, k_size, blocks_each,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """``out`` [m n] from left [m k] and right [n k]; with ``right_up``, gated by their product.

    PAIR: ``right`` [2 n k] holds both.
    """
    n = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    first = part * blocks_each * BLOCK_K
    last = tl.minimum(first + blocks_each * BLOCK_K, k_size)
    COLUMNS: tl.constexpr = 2 * BLOCK_N if PAIR else BLOCK_N
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    acc_up = None
    if PAIR:
        acc = multiply_pair(
            left.ptr, left, right.ptr, right, m, n, m_size, n_size, first, last, k_size,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False, blocks,
        )  # fmt: skip
    elif right_up is None:
        for k in tl.range(first, last, BLOCK_K):
            a = load_tile(left.ptr, left, m, k, m_size, k_size, BLOCK_M, BLOCK_K, False)
            b = load_tile(right.ptr, right, n, k, n_size, k_size, BLOCK_N, BLOCK_K, False)
            if b.dtype != a.dtype:
                b = b.to(a.dtype)
            acc = dot_scaled(a, b.T, acc, blocks, m, n, k, m_size, PRECISION, BLOCK_M)
    else:
        acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(first, last, BLOCK_K):
            a = load_tile(left.ptr, left, m, k, m_size, k_size, BLOCK_M, BLOCK_K, False)
            b = load_tile(right.ptr, right, n, k, n_size, k_size, BLOCK_N, BLOCK_K, False)
            b_up = load_tile(right_up.ptr, right_up, n, k, n_size, k_size, BLOCK_N, BLOCK_K, False)
            acc = dot(a, b.T, acc, PRECISION)
            acc_up = dot(a, b_up.T, acc_up, PRECISION)
    arrived = parts - 1
    if partials is not None:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        first_part = tile.to(tl.int64) * parts
        leave(partials.acc, first_part + part, acc, BLOCK_M, COLUMNS)
        if right_up is not None:
            leave(partials.acc_up, first_part + part, acc_up, BLOCK_M, BLOCK_N)
        # the counter stands for what all threads of the block have written
        tl.debug_barrier()
        arrived = tl.atomic_add(partials.counters + tile, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.store(partials.counters + tile, 0)
            acc = join(partials.acc, first_part, parts, BLOCK_M, COLUMNS)
            if right_up is not None:
                acc_up = join(partials.acc_up, first_part, parts, BLOCK_M, BLOCK_N)
    if arrived == parts - 1:
        y = acc
        y_up = acc_up
        if PAIR:
            y, y_up = halves(acc)
        finish(
            y, y_up, out, bias, bias_up, dropout, residual, pre, pre_up, scales, row_scales,
            out.ptr, out.ptr, out.ptr, m, n, m_size, n_size,
            ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_N, False,
        )  # fmt: skip


@triton.jit
def _part(partials, index, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Addresses of one part of a tile."""
    r = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N
    return partials + index * (BLOCK_M * BLOCK_N) + r + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def leave(partials, index, acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write one part of a tile."""
    tl.store(_part(partials, index, BLOCK_M, BLOCK_N), acc)


@triton.jit
def join(partials, first_part, parts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of all parts; ``.cg`` reads past the L1 cache, which does not see others' writes."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], partials.dtype.element_ty)
    for part in tl.range(0, parts):
        pointers = _part(partials, first_part + part, BLOCK_M, BLOCK_N)
        acc += tl.load(pointers, cache_modifier=".cg")
    return acc


def choose_small(x: Tensor, gated: bool, aligned: bool) -> SmallLaunch:
    """The launch for the rows of ``x`` [m k]; ``aligned``: all rows begin at 16 bytes."""
    block_m = 16 if x.shape[0] <= 16 else 32 if x.shape[0] <= 32 else 64
    if architecture(x.device) == 0:
        return SmallLaunch(block_m, 16, 32, 4, 1)
    if x.element_size() == 4:
        return SmallLaunch(block_m, 32, 16 if not aligned else 32 if gated else 64, 4, 3)
    if not aligned:
        return SmallLaunch(block_m, 32, 32, 4, 2)
    if x.element_size() == 1:
        return SmallLaunch(block_m, 32, 128, 4, 4)
    block_k = 256 if block_m == 16 and not gated else 64 if block_m == 32 and gated else 128
    return SmallLaunch(block_m, 32, block_k, 4, 4)


def split(blocks: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """(blocks of the reduction for each part, parts) of ``tiles`` with so many blocks each."""
    # two programs for each multiprocessor, while each has two blocks to load one after the other
    wanted = triton.cdiv(2 * multiprocessors(device), max(tiles, 1))
    blocks_each = triton.cdiv(blocks, max(1, min(wanted, blocks // 2)))
    return blocks_each, max(1, triton.cdiv(blocks, max(blocks_each, 1)))


def room_for_parts(
    shape: tuple[int, int, int, int], dtype: torch.dtype, gated: bool, device: torch.device
) -> Partials | None:
    """For ``shape``: tiles, parts of each, and their rows and columns; None for one part."""
    tiles, parts, *_ = shape
    if parts == 1 or tiles == 0:
        return None
    acc = torch.empty(shape, dtype=dtype, device=device)
    acc_up = torch.empty_like(acc) if gated else None
    return Partials(acc, acc_up, zero_counters(tiles, device))


def small_product(
    left: Tensor,
    right: Tensor,
    epilogue: Epilogue,
    activation: str,
    right_up: Tensor | None,
    pair: bool = False,
    blocks: BlockScales | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``product`` for up to MAX_ROWS rows."""
    (m_size, k_size), n_size = left.shape, right.shape[0] // (1 + pair)
    out = left.new_empty(m_size, n_size, dtype=dtype)
    weights = [right] if right_up is None else [right, right_up]
    aligned = all_fit_tma(left, *weights)
    gated = pair or right_up is not None
    config = unless_forced("small_product", choose_small(left, gated, aligned))
    n_tiles, m_tiles = triton.cdiv(n_size, config.BLOCK_N), triton.cdiv(m_size, config.BLOCK_M)
    tiles = n_tiles * m_tiles
    k_blocks = triton.cdiv(k_size, config.BLOCK_K)
    blocks_each, parts = split(k_blocks, tiles, left.device)
    shape = (tiles, parts, config.BLOCK_M, config.BLOCK_N * (1 + pair))
    partials = room_for_parts(shape, torch.float32, right_up is not None, left.device)
    launch(
        small_product_tiles,
        (n_tiles, m_tiles, parts),
        left.device,
        out=matrix(out),
        left=matrix(left),
        right=matrix(right),
        right_up=None if right_up is None else matrix(right_up),
        **epilogue._asdict(),
        blocks=blocks,
        partials=partials,
        m_size=m_size,
        n_size=n_size,
        k_size=k_size,
        blocks_each=blocks_each,
        ACTIVATION=activation,
        PRECISION=product_precision(left.dtype),
        PAIR=pair,
        **asdict(config),
    )
    return out
