"""Matrices by tiles: loaded by TMA where strides allow, else by pointers; and their products.

A product is ``left right``: left is [M, K] with K adjacent or not, right is a weight [N, K], as
torch.nn.Linear keeps it, or [K, N]. Both are given as they lie in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.formats import FP8_BLOCK

from .attention_rows import fits_tma
from .runtime import dot, wide

_BLOCK = tl.constexpr(FP8_BLOCK)


class Matrix(NamedTuple):
    """A tensor [rows columns] by its strides."""

    ptr: Tensor
    row_stride: int
    column_stride: int


def matrix(x: Tensor) -> Matrix:
    """Float[rows columns], any strides."""
    return Matrix(x, *x.stride())


class BlockScales(NamedTuple):
    """Scales within a sum, for tiles of at most FP8_BLOCK columns and as much of K.

    Attributes:
        left: Float32[groups m], of FP8_BLOCK columns of a row of the left operand.
        right: Float32[n / FP8_BLOCK groups], of as many rows and columns of the weight.
        groups: K / FP8_BLOCK, rounded up.
    """

    left: Tensor
    right: Tensor
    groups: int


def optional_matrix(x: Tensor | None) -> Matrix | None:
    """``matrix`` of a tensor that may be missing."""
    return None if x is None else matrix(x)


def all_fit_tma(*tensors: Tensor) -> bool:
    """Whether the copy engine can read all of them: rows of 16 bytes, columns adjacent."""
    return all(x.numel() > 0 and fits_tma(x) for x in tensors)


@triton.jit
def open_matrix(
    x, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """What ``load_tile`` reads ``x`` from: a descriptor, or its address."""
    if TMA:
        source = tl.make_tensor_descriptor(
            x.ptr,
            shape=[rows, columns],
            strides=[x.row_stride, 1],
            block_shape=[BLOCK_ROWS, BLOCK_COLUMNS],
        )
    else:
        source = x.ptr
    return source


@triton.jit
def load_tile(
    source, x, row, column, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_ROWS, BLOCK_COLUMNS] from (row, column) on, zeros outside of the matrix."""
    if TMA:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, BLOCK_ROWS)
        c = column + tl.arange(0, BLOCK_COLUMNS)
        pointers = source + wide(r)[:, None] * x.row_stride + wide(c)[None, :] * x.column_stride
        tile = tl.load(pointers, mask=(r[:, None] < rows) & (c[None, :] < columns), other=0.0)
    return tile


@triton.jit
def store_tile(
    tile, x, row, column, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write [BLOCK_ROWS, BLOCK_COLUMNS] from (row, column) on, nothing outside of the matrix."""
    r = row + tl.arange(0, BLOCK_ROWS)
    c = column + tl.arange(0, BLOCK_COLUMNS)
    pointers = x.ptr + wide(r)[:, None] * x.row_stride + wide(c)[None, :] * x.column_stride
    inside = (r[:, None] < rows) & (c[None, :] < columns)
    tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_tile(
    tile, sink, x, row, column, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """As ``store_tile``, to what ``open_matrix`` opened."""
    if TMA:
        sink.store([row, column], tile.to(x.ptr.dtype.element_ty))
    else:
        store_tile(tile, x, row, column, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def halves(tile):
    """The left and right half of the columns; an epilogue takes them in turn to save registers."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    left, right = tl.split(tl.permute(tl.reshape(tile, [M, 2, N // 2]), [0, 2, 1]))
    return left, right


@triton.jit
def open_right(
    right, n_size, k_size,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, N_FIRST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``open_matrix`` for the right operand of a product: [N, K] where N_FIRST, else [K, N]."""
    if N_FIRST:
        source = open_matrix(right, n_size, k_size, BLOCK_N, BLOCK_K, TMA)
    else:
        source = open_matrix(right, k_size, n_size, BLOCK_K, BLOCK_N, TMA)
    return source


@triton.jit
def load_right(
    source, right, n, k, n_size, k_size,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, N_FIRST: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of the right operand."""
    if N_FIRST:
        tile = load_tile(source, right, n, k, n_size, k_size, BLOCK_N, BLOCK_K, TMA).T
    else:
        tile = load_tile(source, right, k, n, k_size, n_size, BLOCK_K, BLOCK_N, TMA)
    return tile


@triton.jit
def multiply(
    acc, left_source, left, right_source, right, m, n, m_size, n_size, k_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    N_FIRST: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, blocks=None,
):  # fmt: skip
    """``acc`` [BLOCK_M, BLOCK_N] plus the product of rows ``m`` and columns ``n`` on.

    A right operand in fp8 is widened to the dtype of the left one. blocks: ``BlockScales`` or None.
    """
    for k in tl.range(0, k_size, BLOCK_K):
        a = load_tile(left_source, left, m, k, m_size, k_size, BLOCK_M, BLOCK_K, TMA)
        b = load_right(right_source, right, n, k, n_size, k_size, BLOCK_N, BLOCK_K, N_FIRST, TMA)
        if b.dtype != a.dtype:
            b = b.to(a.dtype)
        acc = dot_scaled(a, b, acc, blocks, m, n, k, m_size, PRECISION, BLOCK_M)
    return acc


@triton.jit
def dot_scaled(
    a, b, acc, blocks, m, n, k, m_size, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, n_up=None
):
    """``acc + a @ b``, the product of a part of one block times its scales where it has any.

    n_up: where the second half of the columns of ``b`` begins, if it does not follow the first.
    """
    if blocks is None:
        acc = dot(a, b, acc, PRECISION)
    else:
        r = m + tl.arange(0, BLOCK_M)
        group = k // _BLOCK
        left = tl.load(blocks.left + wide(group) * m_size + r, mask=r < m_size, other=0.0)
        right = tl.load(blocks.right + n // _BLOCK * blocks.groups + group)
        if n_up is not None:
            up = tl.load(blocks.right + n_up // _BLOCK * blocks.groups + group)
            in_first = tl.arange(0, b.shape[1]) < b.shape[1] // 2
            right = tl.where(in_first, right, up)[None, :]
        acc += dot(a, b, None, PRECISION) * (left[:, None] * right)
    return acc


@triton.jit
def tile_corner(tile, m_size, n_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                GROUP_M: tl.constexpr):  # fmt: skip
    """(m, n) where a tile of the result begins: GROUP_M tiles down, then one to the right.

    Tiles that run at a time then share their rows and columns in the L2 cache.
    """
    m_tiles = tl.cdiv(m_size, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(n_size, BLOCK_N)
    first = tile // in_group * GROUP_M
    height = tl.minimum(m_tiles - first, GROUP_M)
    m = first + tile % in_group % height
    n = tile % in_group // height
    return m * BLOCK_M, n * BLOCK_N
