"""A gate and the weight that it gates as one matrix [2 n k]: rows of the gate, then of the other.

A tile has as many rows of both and is one operand of one product: Hopper's tensor cores multiply
128 columns at a time, and wait once for both, where 64 of each fill the registers. The halves of
the sum lie in the same threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .matrix import dot_scaled, load_tile
from .runtime import wide


@triton.jit
def open_pair(right, n_size, k_size, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              TMA: tl.constexpr):  # fmt: skip
    """``open_matrix`` for a pair of ``n_size`` rows each."""
    if TMA:
        source = tl.make_tensor_descriptor(
            right.ptr,
            shape=[2, n_size, k_size],
            strides=[wide(n_size) * right.row_stride, right.row_stride, 1],
            block_shape=[2, BLOCK_N, BLOCK_K],
        )
    else:
        source = right.ptr
    return source


@triton.jit
def load_pair(source, right, n, k, n_size, k_size, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              TMA: tl.constexpr):  # fmt: skip
    """[2 BLOCK_N, BLOCK_K]: rows ``n`` on of the gate and of the other; zeros beyond them."""
    if TMA:
        tile = tl.reshape(source.load([0, n, k]), [2 * BLOCK_N, BLOCK_K])
    else:
        i = tl.arange(0, 2 * BLOCK_N)
        r = n + i % BLOCK_N
        c = k + tl.arange(0, BLOCK_K)
        rows = wide(r + i // BLOCK_N * n_size)
        pointers = (
            source + rows[:, None] * right.row_stride + wide(c)[None, :] * right.column_stride
        )
        tile = tl.load(pointers, mask=(r[:, None] < n_size) & (c[None, :] < k_size), other=0.0)
    return tile


@triton.jit
def multiply_pair(
    left_source, left, right_source, right, m, n, m_size, n_size, k_first, k_last, k_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, blocks,
):  # fmt: skip
    """Float32[BLOCK_M, 2 BLOCK_N]: both products of columns ``k_first`` to ``k_last``."""
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for k in tl.range(k_first, k_last, BLOCK_K):
        a = load_tile(left_source, left, m, k, m_size, k_size, BLOCK_M, BLOCK_K, TMA)
        b = load_pair(right_source, right, n, k, n_size, k_size, BLOCK_N, BLOCK_K, TMA)
        acc = dot_scaled(a, b.T, acc, blocks, m, n, k, m_size, PRECISION, BLOCK_M, n_size + n)
    return acc
