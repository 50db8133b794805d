"""The dropout bits of llmos_fast/dropout.py on the GPU."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.dropout import ROUNDS, keep_scale, threshold

_ROUNDS = tl.constexpr(ROUNDS)


class Dropout(NamedTuple):
    """An element is kept where its bits, less 2^31, are over ``last_dropped``."""

    seed: Tensor
    last_dropped: int
    keep_scale: float


def dropout_numbers(seed: Tensor | None, p: float) -> Dropout | None:
    """What a kernel needs to drop elements; None where it drops none."""
    drop_below = threshold(p)
    if seed is None or drop_below == 0:
        return None
    return Dropout(seed, drop_below - 1 - 2**31, keep_scale(p))


@triton.jit
def kept(dropout, row_base, rows, first_column, COLUMNS: tl.constexpr):
    """Bool tile: which elements dropout keeps, of rows ``row_base + rows``; see ``random_bits``."""
    seed = tl.load(dropout.seed)
    bits = random_bits(seed, row_base + rows, first_column, COLUMNS)
    last = tl.cast(dropout.last_dropped, tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000
    return bits > last


@triton.jit
def random_bits(seed, rows, first_column, COLUMNS: tl.constexpr):
    """32 random bits of columns ``first_column + [0, COLUMNS)``; both are multiples of 4.

    ``rows`` is Int64[R, 1] for [R, COLUMNS] bits, or Int64[1, R] for [COLUMNS, R].
    """
    # [COLUMNS / 4]: one counter gives the bits of four neighbours
    counter = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    low = rows.to(tl.uint32)
    high = (rows >> 32).to(tl.uint32)
    if rows.shape[1] == 1:
        c0, c1 = tl.broadcast(counter[None, :], low)
        c2 = tl.broadcast_to(high, c0.shape)
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), _ROUNDS)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [R, COLUMNS / 4, 2, 2]
        bits = tl.reshape(words, [rows.shape[0], COLUMNS])
    else:
        c0, c1 = tl.broadcast(counter[:, None], low)
        c2 = tl.broadcast_to(high, c0.shape)
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), _ROUNDS)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [COLUMNS / 4, R, 2, 2]
        bits = tl.reshape(tl.permute(words, [0, 2, 3, 1]), [COLUMNS, rows.shape[1]])
    return bits
