"""What happens to a tile of a product before it leaves: all of it on the fp32 accumulator."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .matrix import Matrix, halves, load_tile, write_tile
from .philox import Dropout, kept
from .runtime import wide


class Epilogue(NamedTuple):
    """What happens to a tile of the product; None is off.

    Attributes:
        bias: Float[n].
        bias_up: Float[n], of the product that the activated one gates.
        dropout: keyed on (row, column) of the result.
        residual: Matrix [m n], added last.
        pre: Matrix [m n], receives the product with its bias, before the activation.
        pre_up: Matrix [m n], likewise of the product that is gated, together with ``pre``.
        scales: Float32[n], of the product itself, before anything else; n more of the product that
            is gated, where there is one.
        row_scales: Float32[m], likewise.
    """

    bias: Tensor | None
    bias_up: Tensor | None = None
    dropout: Dropout | None = None
    residual: Matrix | None = None
    pre: Matrix | None = None
    pre_up: Matrix | None = None
    scales: Tensor | None = None
    row_scales: Tensor | None = None


@triton.jit
def add_bias(acc, bias, column, n_size, BLOCK_N: tl.constexpr):
    """``acc`` [BLOCK_M, BLOCK_N] with the bias of columns ``column`` on."""
    if bias is not None:
        c = column + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + c, mask=c < n_size, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def drop(y, dropout, row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout of the tile [BLOCK_M, BLOCK_N] from (row, column) on."""
    if dropout is not None:
        rows = wide(row + tl.arange(0, BLOCK_M))[:, None]
        y = tl.where(kept(dropout, 0, rows, column, BLOCK_N), y * dropout.keep_scale, 0.0)
    return y


@triton.jit
def finish(
    y, up, out, bias, bias_up, dropout, residual, pre, pre_up, scales, row_scales,
    sink, pre_sink, up_sink, m, n, m_size, n_size,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Everything between the accumulators of a tile and memory, PART columns at a time."""
    if BLOCK_N > PART:
        HALF: tl.constexpr = BLOCK_N // 2
        y_0, y_1 = halves(y)
        if up is None:
            up_0 = None
            up_1 = None
        else:
            up_0, up_1 = halves(up)
        finish(
            y_0, up_0, out, bias, bias_up, dropout, residual, pre, pre_up, scales, row_scales,
            sink, pre_sink, up_sink, m, n, m_size, n_size,
            ACTIVATION, BLOCK_M, HALF, PART, TMA,
        )  # fmt: skip
        finish(
            y_1, up_1, out, bias, bias_up, dropout, residual, pre, pre_up, scales, row_scales,
            sink, pre_sink, up_sink, m, n + HALF, m_size, n_size,
            ACTIVATION, BLOCK_M, HALF, PART, TMA,
        )  # fmt: skip
    else:
        if scales is not None:
            c = n + tl.arange(0, BLOCK_N)
            y *= tl.load(scales + c, mask=c < n_size, other=0.0)[None, :]
            if up is not None:
                up *= tl.load(scales + n_size + c, mask=c < n_size, other=0.0)[None, :]
        if row_scales is not None:
            r = m + tl.arange(0, BLOCK_M)
            of_rows = tl.load(row_scales + r, mask=r < m_size, other=0.0)[:, None]
            y *= of_rows
            if up is not None:
                up *= of_rows
        y = add_bias(y, bias, n, n_size, BLOCK_N)
        if pre is not None:
            write_tile(y, pre_sink, pre, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)
        y = activate(y, ACTIVATION)
        if up is not None:
            up = add_bias(up, bias_up, n, n_size, BLOCK_N)
            if pre is not None:
                write_tile(up, up_sink, pre_up, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)
            y *= up
        y = drop(y, dropout, m, n, BLOCK_M, BLOCK_N)
        if residual is not None:
            y += load_tile(
                residual.ptr, residual, m, n, m_size, n_size, BLOCK_M, BLOCK_N, False
            ).to(tl.float32)
        write_tile(y, sink, out, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)
