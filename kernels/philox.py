"""The dropout bits of llmos_fast/dropout.py on the GPU."""

import triton
import triton.language as tl

from llmos_fast.dropout import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


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
