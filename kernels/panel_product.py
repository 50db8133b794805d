"""epilogue(x W^T) for weights in panels: decoded in registers, at any number of rows.

The product of a tile may be cut into parts of the reduction, as in small_product.py. Activations
are floating point, and so is the weight then, scaled; or they are int8 with scales of their own,
and so are levels, whose products are exact: they are scaled group by group, or at the end where a
group is a whole row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import Epilogue, finish
from .launch import unless_forced
from .matrix import load_tile, matrix, tile_corner
from .panel_launch import choose_panels
from .panels import WHOLE_ROW, Panels, load_levels, load_rows, load_weight
from .runtime import dot, launch, product_precision, wide
from .small_product import join, leave, room_for_parts, split

_GROUP_M = tl.constexpr(8)
_WHOLE_ROW = tl.constexpr(WHOLE_ROW)


@triton.jit
def panel_product_tiles(
    out, left, left_scales, words, scales, zeros, bias, bias_up, residual, partials,
    m_size, n_size, k_size, word_columns, groups, blocks_each,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """``out`` [m n] from left [m k] and a weight [n k]; GATED: by the weight that lies in turn."""
    tile = tl.program_id(0)
    m, n = tile_corner(tile, m_size, n_size, BLOCK_M, BLOCK_N, _GROUP_M)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    first = part * blocks_each * BLOCK_K
    last = tl.minimum(first + blocks_each * BLOCK_K, k_size)
    EXACT: tl.constexpr = left_scales is not None and GROUP == _WHOLE_ROW
    SUM: tl.constexpr = tl.int32 if EXACT else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    acc_up = None
    if GATED:
        acc_up = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for k in tl.range(first, last, BLOCK_K):
        a = load_tile(left.ptr, left, m, k, m_size, k_size, BLOCK_M, BLOCK_K, False)
        acc = add_product(
            acc, a, left_scales, words, scales, zeros, m, n, k, m_size, n_size, word_columns,
            groups, FORMAT, GROUP, 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if GATED:
            acc_up = add_product(
                acc_up, a, left_scales, words, scales, zeros, m, n, k, m_size, n_size,
                word_columns, groups, FORMAT, GROUP, 1, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    arrived = parts - 1
    if partials is not None:
        first_part = tile.to(tl.int64) * parts
        leave(partials.acc, first_part + part, acc, BLOCK_M, BLOCK_N)
        if GATED:
            leave(partials.acc_up, first_part + part, acc_up, BLOCK_M, BLOCK_N)
        # the counter stands for what all threads of the block have written
        tl.debug_barrier()
        arrived = tl.atomic_add(partials.counters + tile, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.store(partials.counters + tile, 0)
            acc = join(partials.acc, first_part, parts, BLOCK_M, BLOCK_N)
            if GATED:
                acc_up = join(partials.acc_up, first_part, parts, BLOCK_M, BLOCK_N)
    if arrived == parts - 1:
        y = scaled(acc, left_scales, scales, m, n, m_size, n_size, groups, 0, BLOCK_M, BLOCK_N)
        y_up = None
        if GATED:
            y_up = scaled(
                acc_up, left_scales, scales, m, n, m_size, n_size, groups, 1, BLOCK_M, BLOCK_N
            )  # fmt: skip
        finish(
            y, y_up, out, bias, bias_up, None, residual, None, None, None, None,
            out.ptr, out.ptr, out.ptr, m, n, m_size, n_size,
            ACTIVATION, BLOCK_M, BLOCK_N, PART, False,
        )  # fmt: skip


@triton.jit
def add_product(
    acc, a, left_scales, words, scales, zeros, m, n, k, m_size, n_size, word_columns, groups,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the product of ``a`` and the block of the weight at (n, k)."""
    if left_scales is None:
        weight = load_weight(
            words, scales, zeros, n, k, n_size, word_columns, groups, FORMAT, GROUP, UP,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc = dot(a, weight.to(a.dtype).T, acc, PRECISION)
    else:
        levels = load_levels(
            words, zeros, n, k, n_size, word_columns, groups, FORMAT, GROUP, UP, BLOCK_N, BLOCK_K
        )  # fmt: skip
        if acc.dtype == tl.int32:
            acc = tl.dot(a, levels.to(tl.int8).T, acc, out_dtype=tl.int32)
        else:
            sums = tl.dot(a, levels.to(tl.int8).T, out_dtype=tl.int32)
            acc += sums.to(tl.float32) * product_scales(
                left_scales, scales, m, n, k // GROUP, m_size, n_size, groups, UP, BLOCK_M, BLOCK_N
            )  # fmt: skip
    return acc


@triton.jit
def scaled(acc, left_scales, scales, m, n, m_size, n_size, groups, UP: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Float32: what is still a sum of integers, scaled."""
    if acc.dtype == tl.int32:
        acc = acc.to(tl.float32) * product_scales(
            left_scales, scales, m, n, 0, m_size, n_size, groups, UP, BLOCK_M, BLOCK_N
        )  # fmt: skip
    return acc


@triton.jit
def product_scales(left_scales, scales, m, n, group, m_size, n_size, groups, UP: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Float32[BLOCK_M, BLOCK_N] of a group: of rows of the left [groups m] times of the weight."""
    r = m + tl.arange(0, BLOCK_M)
    left = tl.load(left_scales + wide(group) * m_size + r, mask=r < m_size, other=0.0)
    right = tl.reshape(load_rows(scales, n, group, n_size, groups, UP, BLOCK_N, 1), [BLOCK_N])
    return left[:, None] * right.to(tl.float32)[None, :]


def panel_product(
    left: Tensor,
    left_scales: Tensor | None,
    weight: Panels,
    epilogue: Epilogue,
    out: Tensor,
    activation: str,
) -> None:
    """``out`` [m n] = epilogue(left [m k] weight^T), the left one with its scales [groups m]."""
    (m_size, n_size), k_size = out.shape, left.shape[1]
    config = unless_forced("panel_product", choose_panels(left, weight.GROUP, weight.GATED))
    tiles = config.tiles(m_size, n_size)
    blocks_each, parts = split(triton.cdiv(k_size, config.BLOCK_K), tiles, out.device)
    integers = left_scales is not None and weight.GROUP == WHOLE_ROW
    shape = (tiles, parts, config.BLOCK_M, config.BLOCK_N)
    sums = torch.int32 if integers else torch.float32
    launch(
        panel_product_tiles,
        (tiles, parts),
        out.device,
        out=matrix(out),
        left=matrix(left),
        left_scales=left_scales,
        **weight._asdict(),
        bias=epilogue.bias,
        bias_up=epilogue.bias_up,
        residual=epilogue.residual,
        partials=room_for_parts(shape, sums, weight.GATED, out.device),
        m_size=m_size,
        n_size=n_size,
        k_size=k_size,
        blocks_each=blocks_each,
        ACTIVATION=activation,
        PRECISION=product_precision(left.dtype),
        **config.options(),
    )
