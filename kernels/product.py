"""epilogue(left right^T + bias): a persistent product whose tiles are finished before they leave.

The epilogue works on the fp32 accumulator: bias, activation, gate, dropout, residual. Each program
takes every n-th tile, so that loads of the next tile overlap the epilogue of the last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import Epilogue, finish
from .matrix import (
    BlockScales,
    all_fit_tma,
    halves,
    load_tile,
    matrix,
    multiply,
    open_matrix,
    open_right,
    tile_corner,
)
from .pair import multiply_pair, open_pair
from .product_launch import choose_product
from .runtime import dot, launch, product_precision, programs
from .small_product import MAX_ROWS, small_product

_N_FIRST = tl.constexpr(True)


@triton.jit
def product_tiles(
    out, left, right, right_up, bias, bias_up, dropout, residual, pre, pre_up, scales, row_scales,
    blocks, m_size, n_size, k_size,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PART: tl.constexpr, TMA: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """``out`` [m n] from left [m k] and right [n k]; with ``right_up``, gated by their product.

    PAIR: ``right`` [2 n k] holds both.
    """
    left_source = open_matrix(left, m_size, k_size, BLOCK_M, BLOCK_K, TMA)
    if PAIR:
        right_source = open_pair(right, n_size, k_size, BLOCK_N, BLOCK_K, TMA)
    else:
        right_source = open_right(right, n_size, k_size, BLOCK_N, BLOCK_K, _N_FIRST, TMA)
    if right_up is not None:
        up_source = open_right(right_up, n_size, k_size, BLOCK_N, BLOCK_K, _N_FIRST, TMA)
    sink = open_matrix(out, m_size, n_size, BLOCK_M, PART, TMA)
    pre_sink = sink
    up_sink = sink
    if pre is not None:
        pre_sink = open_matrix(pre, m_size, n_size, BLOCK_M, PART, TMA)
    if pre is not None and right_up is not None:
        up_sink = open_matrix(pre_up, m_size, n_size, BLOCK_M, PART, TMA)
    tiles = tl.cdiv(m_size, BLOCK_M) * tl.cdiv(n_size, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile_corner(tile, m_size, n_size, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_up = None
        if PAIR:
            both = multiply_pair(
                left_source, left, right_source, right, m, n, m_size, n_size, 0, k_size, k_size,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA, blocks,
            )  # fmt: skip
            acc, acc_up = halves(both)
        elif right_up is None:
            acc = multiply(
                acc, left_source, left, right_source, right, m, n, m_size, n_size, k_size,
                BLOCK_M, BLOCK_N, BLOCK_K, _N_FIRST, PRECISION, TMA, blocks,
            )  # fmt: skip
        else:
            acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            acc, acc_up = multiply_both(
                acc, acc_up, left_source, left, right_source, right, up_source, right_up,
                m, n, m_size, n_size, k_size, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA,
            )  # fmt: skip
        finish(
            acc, acc_up, out, bias, bias_up, dropout, residual, pre, pre_up, scales, row_scales,
            sink, pre_sink, up_sink, m, n, m_size, n_size,
            ACTIVATION, BLOCK_M, BLOCK_N, PART, TMA,
        )  # fmt: skip


@triton.jit
def multiply_both(
    acc, acc_up, left_source, left, right_source, right, up_source, up,
    m, n, m_size, n_size, k_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``multiply`` by two weights [n k]; rows of ``left`` are loaded once."""
    for k in tl.range(0, k_size, BLOCK_K):
        a = load_tile(left_source, left, m, k, m_size, k_size, BLOCK_M, BLOCK_K, TMA)
        b = load_tile(right_source, right, n, k, n_size, k_size, BLOCK_N, BLOCK_K, TMA)
        b_up = load_tile(up_source, up, n, k, n_size, k_size, BLOCK_N, BLOCK_K, TMA)
        acc = dot(a, b.T, acc, PRECISION)
        acc_up = dot(a, b_up.T, acc_up, PRECISION)
    return acc, acc_up


def flat(x: Tensor) -> Tensor:
    """[... columns] as [rows columns], also where there are none."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def needs_gradients(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd may ask for what a forward pass computes on its way."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def product(
    left: Tensor,
    right: Tensor,
    epilogue: Epilogue,
    *,
    activation: str = "",
    right_up: Tensor | None = None,
    pair: bool = False,
    blocks: BlockScales | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Float[m n] = epilogue(left [m k] right [n k]^T), any strides; in ``dtype``, or left's.

    right_up: of right's shape; its product is gated by the other one, which is activated.
    pair: right is [2 n k] and holds both, the gate first.
    """
    if 0 < left.shape[0] <= MAX_ROWS:
        return small_product(left, right, epilogue, activation, right_up, pair, blocks, dtype)
    (m_size, k_size), n_size = left.shape, right.shape[0] // (1 + pair)
    out = left.new_empty(m_size, n_size, dtype=dtype)
    weights = [right] if right_up is None else [right, right_up]
    aligned = all_fit_tma(out, left, *weights)
    config = choose_product("product", left, n_size, len(weights) + pair, aligned)
    launch(
        product_tiles,
        (programs(left.device, config.tiles(m_size, n_size)),),
        left.device,
        out=matrix(out),
        left=matrix(left),
        right=matrix(right),
        right_up=None if right_up is None else matrix(right_up),
        **epilogue._asdict(),
        blocks=blocks,
        m_size=m_size,
        n_size=n_size,
        k_size=k_size,
        ACTIVATION=activation,
        PRECISION=product_precision(left.dtype),
        PAIR=pair,
        **config.options(),
    )
    return out
