"""Gradients at a hidden layer, in the epilogue of the product that brings them there.

With d_hidden = d_out w_down, a tile gives the gradient before the activation, that of the gated
half, the hidden layer itself for the gradient of w_down, and sums over its rows for the biases.
Arguments of the activation come from memory, or are computed again from x in the same tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, derivative
from .column_sum import sum_rows
from .epilogue import add_bias
from .matrix import (
    all_fit_tma,
    halves,
    load_tile,
    matrix,
    multiply,
    open_matrix,
    open_right,
    optional_matrix,
    tile_corner,
    write_tile,
)
from .philox import Dropout, kept
from .product import multiply_both
from .product_launch import choose_product
from .runtime import launch, product_precision, programs, wide

_N_FIRST = tl.constexpr(True)
_K_FIRST = tl.constexpr(False)


class Activated(NamedTuple):
    """The arguments of the activation, as they were kept, or what they are computed from again.

    Attributes:
        pre: Float[m n], or None.
        pre_up: Float[m n], what is gated, or None.
        x: Float[m k], or None.
        weight: Float[n k], or None.
        weight_up: Float[n k], or None.
        bias: Float[n], or None.
        bias_up: Float[n], or None.
    """

    pre: Tensor | None = None
    pre_up: Tensor | None = None
    x: Tensor | None = None
    weight: Tensor | None = None
    weight_up: Tensor | None = None
    bias: Tensor | None = None
    bias_up: Tensor | None = None


@triton.jit
def ffn_backward_tiles(
    pre_out, up_out, hidden_out, sums, sums_up, d_out, w_down, pre_kept, up_kept,
    x, weight, weight_up, bias, bias_up, dropout, m_size, n_size, out_size, k_size,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, RECOMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PART: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients at the hidden layer [m n] from d_out [m out] and w_down [out n].

    Arguments of the activation are read from the matrices ``pre_kept`` and ``up_kept``, or computed
    from ``x`` [m k], ``weight`` [n k] and ``weight_up``. Results, of which None is not asked for:
    matrices [m n] ``pre_out`` and ``up_out``, gradients of these arguments, and ``hidden_out``, the
    hidden layer after dropout; Float32[row tiles n] ``sums`` and ``sums_up`` of the first two over
    the rows of a tile.
    """
    d_out_source = open_matrix(d_out, m_size, out_size, BLOCK_M, BLOCK_K, TMA)
    down_source = open_right(w_down, n_size, out_size, BLOCK_N, BLOCK_K, _K_FIRST, TMA)
    pre_sink = open_matrix(pre_out, m_size, n_size, BLOCK_M, PART, TMA)
    up_sink = pre_sink
    hidden_sink = pre_sink
    pre_source = pre_sink
    up_source = pre_sink
    if GATED:
        up_sink = open_matrix(up_out, m_size, n_size, BLOCK_M, PART, TMA)
    if hidden_out is not None:
        hidden_sink = open_matrix(hidden_out, m_size, n_size, BLOCK_M, PART, TMA)
    if not RECOMPUTE:
        pre_source = open_matrix(pre_kept, m_size, n_size, BLOCK_M, PART, TMA)
        if GATED:
            up_source = open_matrix(up_kept, m_size, n_size, BLOCK_M, PART, TMA)
    else:
        x_source = open_matrix(x, m_size, k_size, BLOCK_M, BLOCK_K, TMA)
        weight_source = open_right(weight, n_size, k_size, BLOCK_N, BLOCK_K, _N_FIRST, TMA)
        if GATED:
            weight_up_source = open_right(
                weight_up, n_size, k_size, BLOCK_N, BLOCK_K, _N_FIRST, TMA
            )
    tiles = tl.cdiv(m_size, BLOCK_M) * tl.cdiv(n_size, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile_corner(tile, m_size, n_size, BLOCK_M, BLOCK_N, GROUP_M)
        pre = None
        up = None
        if RECOMPUTE:
            pre = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if GATED:
                up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                pre, up = multiply_both(
                    pre, up, x_source, x, weight_source, weight,
                    weight_up_source, weight_up, m, n, m_size, n_size, k_size,
                    BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA,
                )  # fmt: skip
                up = add_bias(up, bias_up, n, n_size, BLOCK_N)
            else:
                pre = multiply(
                    pre, x_source, x, weight_source, weight,
                    m, n, m_size, n_size, k_size,
                    BLOCK_M, BLOCK_N, BLOCK_K, _N_FIRST, PRECISION, TMA,
                )  # fmt: skip
            pre = add_bias(pre, bias, n, n_size, BLOCK_N)
        d_hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        d_hidden = multiply(
            d_hidden, d_out_source, d_out, down_source, w_down, m, n, m_size, n_size, out_size,
            BLOCK_M, BLOCK_N, BLOCK_K, _K_FIRST, PRECISION, TMA,
        )  # fmt: skip
        _finish(
            d_hidden, pre, up,
            pre_out, up_out, hidden_out, sums, sums_up, pre_kept, up_kept, dropout,
            pre_sink, up_sink, hidden_sink, pre_source, up_source, m, n, m_size, n_size,
            ACTIVATION, GATED, BLOCK_M, BLOCK_N, PART, TMA,
        )  # fmt: skip


@triton.jit
def _finish(
    d_hidden, pre, up, pre_out, up_out, hidden_out, sums, sums_up, pre_kept, up_kept, dropout,
    pre_sink, up_sink, hidden_sink, pre_source, up_source, m, n, m_size, n_size,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The results of a tile, PART columns at a time; pre and up are None where they are stored."""
    if BLOCK_N > PART:
        HALF: tl.constexpr = BLOCK_N // 2
        d_hidden_0, d_hidden_1 = halves(d_hidden)
        pre_0 = None
        pre_1 = None
        up_0 = None
        up_1 = None
        if pre is not None:
            pre_0, pre_1 = halves(pre)
        if up is not None:
            up_0, up_1 = halves(up)
        _finish(
            d_hidden_0, pre_0, up_0,
            pre_out, up_out, hidden_out, sums, sums_up, pre_kept, up_kept, dropout,
            pre_sink, up_sink, hidden_sink, pre_source, up_source, m, n, m_size, n_size,
            ACTIVATION, GATED, BLOCK_M, HALF, PART, TMA,
        )  # fmt: skip
        _finish(
            d_hidden_1, pre_1, up_1,
            pre_out, up_out, hidden_out, sums, sums_up, pre_kept, up_kept, dropout,
            pre_sink, up_sink, hidden_sink, pre_source, up_source, m, n + HALF, m_size, n_size,
            ACTIVATION, GATED, BLOCK_M, HALF, PART, TMA,
        )  # fmt: skip
    else:
        if pre is None:
            pre = load_tile(pre_source, pre_kept, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA).to(
                tl.float32
            )
        activated = activate(pre, ACTIVATION)
        keep = None
        if dropout is not None:
            rows = wide(m + tl.arange(0, BLOCK_M))[:, None]
            keep = kept(dropout, 0, rows, n, BLOCK_N)
            d_hidden = tl.where(keep, d_hidden * dropout.keep_scale, 0.0)
        hidden = activated
        d_pre = d_hidden * derivative(pre, ACTIVATION)
        if GATED:
            if up is None:
                up = load_tile(up_source, up_kept, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA).to(
                    tl.float32
                )
            d_up = d_hidden * activated
            write_tile(d_up, up_sink, up_out, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)
            _leave_sums(d_up, sums_up, m, n, m_size, n_size, BLOCK_M, BLOCK_N)
            hidden *= up
            d_pre *= up
        write_tile(d_pre, pre_sink, pre_out, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)
        _leave_sums(d_pre, sums, m, n, m_size, n_size, BLOCK_M, BLOCK_N)
        if hidden_out is not None:
            if dropout is not None:
                hidden = tl.where(keep, hidden * dropout.keep_scale, 0.0)
            write_tile(hidden, hidden_sink, hidden_out, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _leave_sums(tile, sums, m, n, m_size, n_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums over the rows of a tile; rows past the end have no gradient: their d_out is zero."""
    if sums is not None:
        c = n + tl.arange(0, BLOCK_N)
        row = wide(m // BLOCK_M) * n_size
        tl.store(sums + row + c, tl.sum(tile, axis=0), mask=c < n_size)


class Gradients(NamedTuple):
    """Of a hidden layer; None where not asked for."""

    d_pre: Tensor
    d_up: Tensor | None
    hidden: Tensor | None
    d_bias: Tensor | None
    d_bias_up: Tensor | None


def hidden_gradients(
    d_out: Tensor,
    w_down: Tensor,
    a: Activated,
    dropout: Dropout | None,
    *,
    activation: str,
    need_hidden: bool,
    need_bias: bool,
    need_bias_up: bool,
) -> Gradients:
    """Gradients at the hidden layer of d_out [m out] w_down [out n]."""
    (m_size, out_size), n_size = d_out.shape, w_down.shape[1]
    recompute = a.pre is None
    gated = a.pre_up is not None or a.weight_up is not None
    accumulators = 1 + recompute + (recompute and gated)
    tiled = (d_out, w_down, a.pre, a.pre_up, a.x, a.weight, a.weight_up)
    loaded = [t for t in tiled if t is not None]

    def empty() -> Tensor:
        return d_out.new_empty(m_size, n_size)

    d_pre = empty()
    config = choose_product(
        "ffn_backward", d_out, n_size, accumulators, all_fit_tma(d_pre, *loaded)
    )
    row_tiles = triton.cdiv(m_size, config.BLOCK_M)

    def partial_sums(need: bool) -> Tensor | None:
        return d_out.new_empty(row_tiles, n_size, dtype=torch.float32) if need else None

    d_up, hidden = empty() if gated else None, empty() if need_hidden else None
    sums, sums_up = partial_sums(need_bias), partial_sums(need_bias_up)
    launch(
        ffn_backward_tiles,
        (programs(d_out.device, config.tiles(m_size, n_size)),),
        d_out.device,
        pre_out=matrix(d_pre),
        up_out=optional_matrix(d_up),
        hidden_out=optional_matrix(hidden),
        sums=sums,
        sums_up=sums_up,
        d_out=matrix(d_out),
        w_down=matrix(w_down),
        pre_kept=optional_matrix(a.pre),
        up_kept=optional_matrix(a.pre_up),
        x=optional_matrix(a.x),
        weight=optional_matrix(a.weight),
        weight_up=optional_matrix(a.weight_up),
        bias=a.bias,
        bias_up=a.bias_up,
        dropout=dropout,
        m_size=m_size,
        n_size=n_size,
        out_size=out_size,
        k_size=0 if a.x is None else a.x.shape[1],
        ACTIVATION=activation,
        GATED=gated,
        RECOMPUTE=recompute,
        PRECISION=product_precision(d_out.dtype),
        **config.options(),
    )
    return Gradients(
        d_pre,
        d_up,
        hidden,
        None if sums is None else sum_rows(sums, d_out.dtype),
        None if sums_up is None else sum_rows(sums_up, d_out.dtype),
    )
