"""Weights that lie in panels of 16 rows (llmos_fast/quantize.py), decoded in registers.

What a panel holds of its rows, words of codes, scales or zero points, is a run of columns of 16
neighbours: a matrix [panels, columns 16] that is read by tiles. In a gated pair the panels of gate
and up lie in turn, two in a row of that matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.formats import FOUR_BIT, NF4_LEVELS
from llmos_fast.quantize import PANEL, format_of

from .matrix import Matrix, load_tile

# of a format that scales whole rows: no k is beyond its first group
WHOLE_ROW = 2**30
_PANEL = tl.constexpr(PANEL)
_NF4_LEVELS = tl.constexpr(NF4_LEVELS)


class Panels(NamedTuple):
    """The stored parts of a weight, and how to read them.

    Attributes:
        words: Matrix[panels, columns 16] int32.
        scales: Matrix, likewise, of groups.
        zeros: likewise, for int4_asym.
        word_columns: words of a row.
        groups: of a row.
        FORMAT: its name.
        GROUP: weights of a group.
        GATED: whether two panels lie in turn.
    """

    words: Matrix
    scales: Matrix
    zeros: Matrix | None
    word_columns: int
    groups: int
    FORMAT: str
    GROUP: int
    GATED: bool


def panels(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
    gated: bool,
) -> Panels:
    """The parts of a QuantizedWeight as kernels take them."""
    name, in_turn = format_of(scheme), 2 if gated else 1

    def rows(part: Tensor) -> Matrix:
        part = part.contiguous()
        return Matrix(part, in_turn * part.shape[1] * PANEL, 1)

    return Panels(
        rows(packed.contiguous().view(torch.int32)),
        rows(scales),
        None if zero_points is None else rows(zero_points),
        packed.shape[1],
        scales.shape[1],
        name,
        group_size if name in FOUR_BIT else WHOLE_ROW,
        gated,
    )


@triton.jit
def load_rows(x, n, column, n_size, columns, UP: tl.constexpr,
              BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """[BLOCK_N, COLUMNS] from row ``n`` and ``column`` on; UP: of the second panel in turn."""
    tile = load_tile(
        x.ptr + UP * columns * _PANEL, x, n // _PANEL, column * _PANEL,
        tl.cdiv(n_size, _PANEL), columns * _PANEL, BLOCK_N // _PANEL, COLUMNS * _PANEL, False,
    )  # fmt: skip
    tile = tl.reshape(tile, [BLOCK_N // _PANEL, COLUMNS, _PANEL])
    return tl.reshape(tl.permute(tile, [0, 2, 1]), [BLOCK_N, COLUMNS])


@triton.jit
def per_weight(per_group, BLOCK_K: tl.constexpr):
    """[rows, groups] -> [rows, BLOCK_K]: every group's value at each of its weights."""
    rows: tl.constexpr = per_group.shape[0]
    groups: tl.constexpr = per_group.shape[1]
    spread = tl.broadcast_to(per_group[:, :, None], [rows, groups, BLOCK_K // groups])
    return tl.reshape(spread, [rows, BLOCK_K])


@triton.jit
def load_codes(words, n, k, n_size, word_columns, BITS: tl.constexpr, UP: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Int32[BLOCK_N, BLOCK_K] of codes; what lies outside of the weight is 0."""
    IN_WORD: tl.constexpr = 32 // BITS
    tile = load_rows(
        words, n, k // IN_WORD, n_size, word_columns, UP, BLOCK_N, BLOCK_K // IN_WORD
    )  # fmt: skip
    return tl.reshape(codes_of(tile, BITS, 0, 1), [BLOCK_N, BLOCK_K])


@triton.jit
def codes_of(words, BITS: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Int32[words' shape, 2, 2, ..]: every STEP-th code of a word from FIRST on.

    Joined, and not spread over a range, so that all codes of a word stay in one thread.
    """
    if STEP * BITS == 32:
        # byte FIRST % 4; of 4 bits, the high halves hold the last four
        codes = (words >> (FIRST % 4 * 8 + FIRST // 4 * 4)) & (2**BITS - 1)
    else:
        codes = tl.join(
            codes_of(words, BITS, FIRST, 2 * STEP), codes_of(words, BITS, FIRST + STEP, 2 * STEP)
        )
    return codes


@triton.jit
def load_group(x, n, k, n_size, groups, GROUP: tl.constexpr, UP: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """[BLOCK_N, groups] of scales or zero points for the weights from (n, k) on."""
    COUNT: tl.constexpr = max(1, BLOCK_K // GROUP)
    return load_rows(x, n, k // GROUP, n_size, groups, UP, BLOCK_N, COUNT)


@triton.jit
def load_levels(words, zeros, n, k, n_size, word_columns, groups,
                FORMAT: tl.constexpr, GROUP: tl.constexpr, UP: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """[BLOCK_N, BLOCK_K]: what codes stand for before their scales; Int32, of nf4 Float32."""
    BITS: tl.constexpr = 8 if FORMAT == "int8" else 4
    codes = load_codes(words, n, k, n_size, word_columns, BITS, UP, BLOCK_N, BLOCK_K)
    if FORMAT == "int8":
        levels = codes - 128
    elif FORMAT == "int4":
        levels = codes - 8
    elif FORMAT == "int4_asym":
        zero = load_group(zeros, n, k, n_size, groups, GROUP, UP, BLOCK_N, BLOCK_K)
        levels = codes - per_weight(zero.to(tl.int32), BLOCK_K)
    else:
        tl.static_assert(FORMAT == "nf4")
        levels = nf4_levels(codes)
    return levels


@triton.jit
def load_weight(words, scales, zeros, n, k, n_size, word_columns, groups,
                FORMAT: tl.constexpr, GROUP: tl.constexpr, UP: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Float32[BLOCK_N, BLOCK_K]: scale times level."""
    levels = load_levels(
        words, zeros, n, k, n_size, word_columns, groups, FORMAT, GROUP, UP, BLOCK_N, BLOCK_K
    )  # fmt: skip
    scale = load_group(scales, n, k, n_size, groups, GROUP, UP, BLOCK_N, BLOCK_K)
    return levels.to(tl.float32) * per_weight(scale.to(tl.float32), BLOCK_K)


@triton.jit
def nf4_levels(codes):
    """``formats.NF4_LEVELS[codes]``, read from a table: choosing takes three times as long."""
    index = tl.arange(0, 16)
    table = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        table = tl.where(index == i, _NF4_LEVELS[i], table)
    return tl.reshape(tl.gather(table, tl.reshape(codes, [codes.numel]), 0), codes.shape)
