"""Gradients of linear_cross_entropy, one chunk of classes after the other.

A chunk's logits are computed again and become their gradient before they leave the registers; the
rest are two products of that gradient [rows chunk]. d_hidden is summed over chunks in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import LN2, LOG2E
from .column_sum import sum_rows
from .epilogue import add_bias
from .linear_cross_entropy_forward import Loss, cap, local_class
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
from .product_launch import choose_product
from .runtime import contiguous, launch, product_precision, programs, wide

_N_FIRST = tl.constexpr(True)
_K_FIRST = tl.constexpr(False)
# Of a chunk's gradients, unless hidden itself is larger: narrower chunks than that would spend
# their time on adding up d_hidden.
CHUNK_BYTES = 2**27
# chunks begin at whole tiles and at 16 bytes
CHUNK_MULTIPLE = 256


@triton.jit
def d_logits_tiles(
    out, sums, hidden, weight, bias, target, lse, d_losses, d_losses_stride, count,
    first_class, ignore_index, on_target, on_each, z_loss, softcap,
    m_size, n_size, k_size,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PART: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient ``out`` [m n] of the logits of ``n`` classes from ``first_class`` on.

    ``weight`` [n k] and ``bias`` [n] are those of these classes alone. ``sums``: None, or
    Float32[row tiles n], receives the sums over the rows of a tile.
    """
    hidden_source = open_matrix(hidden, m_size, k_size, BLOCK_M, BLOCK_K, TMA)
    weight_source = open_right(weight, n_size, k_size, BLOCK_N, BLOCK_K, _N_FIRST, TMA)
    sink = open_matrix(out, m_size, n_size, BLOCK_M, PART, TMA)
    tiles = tl.cdiv(m_size, BLOCK_M) * tl.cdiv(n_size, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile_corner(tile, m_size, n_size, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = multiply(
            acc, hidden_source, hidden, weight_source, weight, m, n, m_size, n_size, k_size,
            BLOCK_M, BLOCK_N, BLOCK_K, _N_FIRST, PRECISION, TMA,
        )  # fmt: skip
        r = m + tl.arange(0, BLOCK_M)
        inside = r < m_size
        label = tl.load(target + r, mask=inside, other=0)
        counts = inside & (label != ignore_index)
        label = local_class(label, first_class, n_size)
        row_lse = tl.load(lse + r, mask=inside, other=0.0)
        factor = tl.load(d_losses + wide(r) * d_losses_stride, mask=counts, other=0.0)
        if count is not None:
            factor /= tl.maximum(tl.load(count), 1.0)
        _leave_gradient(
            acc, out, sink, sums, bias, softcap, label, counts, row_lse, factor,
            on_target, on_each, z_loss, m, n, m_size, n_size, BLOCK_M, BLOCK_N, PART, TMA,
        )  # fmt: skip


@triton.jit
def _leave_gradient(
    logits, out, sink, sums, bias, softcap, label, counts, lse, factor,
    on_target, on_each, z_loss, m, n, m_size, n_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile, PART columns at a time; rows that do not count have zeros."""
    if BLOCK_N > PART:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(logits)
        _leave_gradient(
            left, out, sink, sums, bias, softcap, label, counts, lse, factor,
            on_target, on_each, z_loss, m, n, m_size, n_size, BLOCK_M, HALF, PART, TMA,
        )  # fmt: skip
        _leave_gradient(
            right, out, sink, sums, bias, softcap, label, counts, lse, factor,
            on_target, on_each, z_loss, m, n + HALF, m_size, n_size, BLOCK_M, HALF, PART, TMA,
        )  # fmt: skip
    else:
        logits = add_bias(logits, bias, n, n_size, BLOCK_N)
        logits, slope = cap(logits, softcap)
        c = n + tl.arange(0, BLOCK_N)
        probability = tl.exp2(logits * LOG2E - lse[:, None])
        d_logits = probability * (factor * (1.0 + lse * z_loss * (2.0 * LN2)))[:, None]
        d_logits -= tl.where(c[None, :] == label[:, None], (factor * on_target)[:, None], 0.0)
        if on_each is not None:
            d_logits -= (factor * on_each)[:, None]
        d_logits = tl.where(counts[:, None], d_logits * slope, 0.0)
        write_tile(d_logits, sink, out, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)
        if sums is not None:
            row = wide(m // BLOCK_M) * n_size
            tl.store(sums + row + c, tl.sum(d_logits, axis=0), mask=c < n_size)


@triton.jit
def add_product_tiles(
    out, added, left, right, m_size, n_size, k_size,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PART: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``out`` [m n] = left [m k] right [k n] + ``added`` [m n], which may be ``out`` or None."""
    left_source = open_matrix(left, m_size, k_size, BLOCK_M, BLOCK_K, TMA)
    right_source = open_right(right, n_size, k_size, BLOCK_N, BLOCK_K, _K_FIRST, TMA)
    sink = open_matrix(out, m_size, n_size, BLOCK_M, PART, TMA)
    tiles = tl.cdiv(m_size, BLOCK_M) * tl.cdiv(n_size, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile_corner(tile, m_size, n_size, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = multiply(
            acc, left_source, left, right_source, right, m, n, m_size, n_size, k_size,
            BLOCK_M, BLOCK_N, BLOCK_K, _K_FIRST, PRECISION, TMA,
        )  # fmt: skip
        _leave_sum(acc, out, sink, added, m, n, m_size, n_size, BLOCK_M, BLOCK_N, PART, TMA)


@triton.jit
def _leave_sum(
    tile, out, sink, added, m, n, m_size, n_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write tile + ``added``, PART columns at a time."""
    if BLOCK_N > PART:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(tile)
        _leave_sum(left, out, sink, added, m, n, m_size, n_size, BLOCK_M, HALF, PART, TMA)
        _leave_sum(right, out, sink, added, m, n + HALF, m_size, n_size, BLOCK_M, HALF, PART, TMA)
    else:
        if added is not None:
            tile += load_tile(added.ptr, added, m, n, m_size, n_size, BLOCK_M, BLOCK_N, False)
        write_tile(tile, sink, out, m, n, m_size, n_size, BLOCK_M, BLOCK_N, TMA)


def chunk_size(rows: int, features: int, classes: int, itemsize: int) -> int:
    """Classes whose gradients [rows chunk] are in memory at a time."""
    columns = max(CHUNK_BYTES // (max(rows, 1) * itemsize), features, CHUNK_MULTIPLE)
    return min(columns // CHUNK_MULTIPLE * CHUNK_MULTIPLE, classes)


def gradients(
    d_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    count: Tensor | None,
    loss: Loss,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, of which some are needed; the others are empty.

    ``d_losses`` are those of the rows, or that of their sum, or where there is a ``count`` that of
    their mean.
    """
    (rows, features), classes = hidden.shape, weight.shape[0]
    need_hidden, need_weight, need_bias = need
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    d_weight = hidden.new_empty(weight.shape if need_weight else 0)
    d_bias = hidden.new_empty(classes if need_bias else 0)
    if rows == 0:
        return d_hidden, d_weight.zero_(), d_bias.zero_()
    chunk = chunk_size(rows, features, classes, hidden.element_size())
    padded = triton.cdiv(chunk, CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    buffer = hidden.new_empty(rows, padded)
    several = need_hidden and chunk < classes
    partial = hidden.new_empty(hidden.shape if several else 0, dtype=torch.float32)
    target, bias = target.contiguous(), contiguous(bias)
    for begin in range(0, classes, chunk):
        part = slice(begin, min(begin + chunk, classes))
        d_logits = buffer[:, : part.stop - begin]
        part_bias = None if bias is None else bias[part]
        sums = _d_logits(
            d_logits, d_losses, hidden, weight[part], target, part_bias, lse, count, loss,
            begin, classes, need_bias,
        )  # fmt: skip
        if sums is not None:
            d_bias[part] = sum_rows(sums, d_bias.dtype)
        if need_weight:
            torch.mm(d_logits.t(), hidden, out=d_weight[part])
        if several:
            out = d_hidden if part.stop == classes else partial
            _add_product(out, partial if begin > 0 else None, d_logits, weight[part])
        elif need_hidden:
            torch.mm(d_logits, weight, out=d_hidden)
    return d_hidden, d_weight, d_bias


def _d_logits(
    out: Tensor,
    d_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    count: Tensor | None,
    loss: Loss,
    first_class: int,
    classes: int,
    need_sums: bool,
) -> Tensor | None:
    """Fill ``out`` [rows chunk]; where needed, its sums [row tiles chunk] in fp32."""
    (m_size, n_size), k_size = out.shape, hidden.shape[1]
    aligned = all_fit_tma(out, hidden, weight)
    config = choose_product("cross_entropy_backward", hidden, n_size, 1, aligned)
    row_tiles = triton.cdiv(m_size, config.BLOCK_M)
    sums = lse.new_empty(row_tiles, n_size) if need_sums else None
    smoothing = loss.label_smoothing
    launch(
        d_logits_tiles,
        (programs(out.device, config.tiles(m_size, n_size)),),
        out.device,
        out=matrix(out),
        sums=sums,
        hidden=matrix(hidden),
        weight=matrix(weight),
        bias=bias,
        target=target,
        lse=lse,
        d_losses=d_losses,
        d_losses_stride=d_losses.stride(0) if d_losses.dim() else 0,
        count=count,
        first_class=first_class,
        ignore_index=loss.ignore_index,
        on_target=1 - smoothing,
        on_each=smoothing / classes if smoothing > 0 else None,
        z_loss=loss.z_loss,
        softcap=loss.softcap if loss.softcap > 0 else None,
        m_size=m_size,
        n_size=n_size,
        k_size=k_size,
        PRECISION=product_precision(out.dtype),
        **config.options(),
    )
    return sums


def _add_product(out: Tensor, added: Tensor | None, left: Tensor, right: Tensor) -> None:
    """``out`` = left right + added, in fp32 before it is rounded to ``out``."""
    (m_size, n_size), k_size = out.shape, left.shape[1]
    aligned = all_fit_tma(out, left, right)
    config = choose_product("cross_entropy_hidden", left, n_size, 1, aligned)
    launch(
        add_product_tiles,
        (programs(out.device, config.tiles(m_size, n_size)),),
        out.device,
        out=matrix(out),
        added=optional_matrix(added),
        left=matrix(left),
        right=matrix(right),
        m_size=m_size,
        n_size=n_size,
        k_size=k_size,
        PRECISION=product_precision(left.dtype),
        **config.options(),
    )
