"""Losses of a linear output layer: its logits live for a tile each, in registers.

A program takes a tile of rows and walks over a part of the classes, with an online log-sum-exp as
in attention. The parts of a row are then joined, which gives its log-sum-exp and its loss; sums
over rows have a fixed order, and the number of rows that count stays on the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import LN2, LOG2E, tanh
from .epilogue import add_bias
from .matrix import all_fit_tma, halves, matrix, multiply, open_matrix, open_right
from .product_launch import ProductLaunch, choose_product
from .runtime import contiguous, launch, multiprocessors, product_precision, wide

_N_FIRST = tl.constexpr(True)
# rows of a program that joins parts, and sums of such that the last program adds at a time
JOINED_ROWS, BLOCK_SUMS = 64, 1024


class Statistics(NamedTuple):
    """Float32[parts rows] of the logits of a part of the classes.

    Attributes:
        maxima: the largest logit, in base 2.
        sums: of 2^(logit - maximum).
        chosen: the logit of the target where it is in this part, else 0.
        totals: sums of the logits, or None.
    """

    maxima: Tensor
    sums: Tensor
    chosen: Tensor
    totals: Tensor | None


class Loss(NamedTuple):
    """What the loss of a row is, beside the cross-entropy; 0 switches it off.

    Attributes:
        ignore_index: target of rows that do not count.
        label_smoothing: share of the target that all classes have in common.
        z_loss: weight of the squared log-sum-exp.
        softcap: tanh limit of the logits.
    """

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


@triton.jit
def cap(logits, softcap):
    """(softcap tanh(logits / softcap), its derivative); without softcap the logits, and 1."""
    slope = 1.0
    if softcap is not None:
        capped = tanh(logits / softcap)
        slope = 1.0 - capped * capped
        logits = capped * softcap
    return logits, slope


@triton.jit
def local_class(label, first, classes):
    """Int32 ``label`` counted from ``first`` on, or -1 where it is none of those ``classes``."""
    label -= first
    return tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)


@triton.jit
def cross_entropy_parts(
    maxima, sums, chosen, totals, hidden, weight, bias, target, softcap,
    rows, classes, features, tiles_each,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PART: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``Statistics`` of hidden weight^T + bias, in parts of ``tiles_each`` tiles of classes."""
    # programs that run at a time share their tiles of weight in the L2 cache
    m = tl.program_id(0) * BLOCK_M
    part = tl.program_id(1)
    hidden_source = open_matrix(hidden, rows, features, BLOCK_M, BLOCK_K, TMA)
    weight_source = open_right(weight, classes, features, BLOCK_N, BLOCK_K, _N_FIRST, TMA)
    r = m + tl.arange(0, BLOCK_M)
    label = local_class(tl.load(target + r, mask=r < rows, other=-1), 0, classes)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    hit = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = part * tiles_each * BLOCK_N
    last = tl.minimum(first + tiles_each * BLOCK_N, classes)
    for n in tl.range(first, last, BLOCK_N):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = multiply(
            acc, hidden_source, hidden, weight_source, weight, m, n, rows, classes, features,
            BLOCK_M, BLOCK_N, BLOCK_K, _N_FIRST, PRECISION, TMA,
        )  # fmt: skip
        m_i, l_i, hit, total = _take(
            acc, m_i, l_i, hit, total, label, bias, softcap, n, classes,
            totals is not None, BLOCK_N, PART,
        )  # fmt: skip
    at = wide(part) * rows + r
    tl.store(maxima + at, m_i, mask=r < rows)
    tl.store(sums + at, l_i, mask=r < rows)
    tl.store(chosen + at, hit, mask=r < rows)
    if totals is not None:
        tl.store(totals + at, total, mask=r < rows)


@triton.jit
def _take(
    logits, m_i, l_i, hit, total, label, bias, softcap, n, classes,
    SMOOTHED: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The statistics with a tile of logits from class ``n`` on, PART columns at a time."""
    if BLOCK_N > PART:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(logits)
        m_i, l_i, hit, total = _take(
            left, m_i, l_i, hit, total, label, bias, softcap, n, classes, SMOOTHED, HALF, PART
        )
        m_i, l_i, hit, total = _take(
            right, m_i, l_i, hit, total, label, bias, softcap, n + HALF, classes,
            SMOOTHED, HALF, PART,
        )  # fmt: skip
    else:
        logits = add_bias(logits, bias, n, classes, BLOCK_N)
        logits, _slope = cap(logits, softcap)
        c = n + tl.arange(0, BLOCK_N)
        if SMOOTHED:
            total += tl.sum(logits, axis=1)  # past the last class they are 0
        hit += tl.sum(tl.where(c[None, :] == label[:, None], logits, 0.0), axis=1)
        logits = tl.where(c[None, :] < classes, logits, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(logits, axis=1) * LOG2E)
        # classes that a bias of -inf takes out may fill a tile: -inf - -inf would be NaN
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        terms = tl.exp2(logits * LOG2E - m_safe[:, None])
        l_i = l_i * tl.exp2(m_i - m_safe) + tl.sum(terms, axis=1)
        m_i = m_new
    return m_i, l_i, hit, total


@triton.jit
def join_parts(
    losses, lse, block_losses, block_counts, maxima, sums, chosen, totals, target,
    rows, parts, ignore_index, on_target, on_each, z_loss,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Float32[rows] ``lse`` in base 2 and ``losses``, 0 where a row does not count; or block sums.

    The target has ``on_target`` of the weight, and every class ``on_each``.
    """
    block = tl.program_id(0)
    r = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = r < rows
    m_i = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_ROWS], tl.float32)
    hit = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for part in tl.range(0, parts):
        at = wide(part) * rows + r
        m_part = tl.load(maxima + at, mask=inside, other=0.0)
        m_new = tl.maximum(m_i, m_part)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        l_part = tl.load(sums + at, mask=inside, other=1.0)
        l_i = l_i * tl.exp2(m_i - m_safe) + l_part * tl.exp2(m_part - m_safe)
        m_i = m_new
        hit += tl.load(chosen + at, mask=inside, other=0.0)
        if totals is not None:
            total += tl.load(totals + at, mask=inside, other=0.0)
    row_lse = m_i + tl.log2(l_i)
    tl.store(lse + r, row_lse, mask=inside)
    row_lse *= LN2
    loss = row_lse - hit * on_target + row_lse * row_lse * z_loss
    if totals is not None:
        loss -= total * on_each
    counts = inside & (tl.load(target + r, mask=inside, other=0) != ignore_index)
    loss = tl.where(counts, loss, 0.0)
    if losses is not None:
        tl.store(losses + r, loss, mask=inside)
    else:
        tl.store(block_losses + block, tl.sum(loss, axis=0))
        tl.store(block_counts + block, tl.sum(counts.to(tl.int32), axis=0))


@triton.jit
def reduce_losses(loss, count, block_losses, block_counts, blocks, BLOCK: tl.constexpr):
    """The sum of the losses; where there is a ``count`` to write, their mean (NaN of none)."""
    total = tl.zeros([BLOCK], tl.float32)
    counted = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, blocks, BLOCK):
        b = first + tl.arange(0, BLOCK)
        total += tl.load(block_losses + b, mask=b < blocks, other=0.0)
        counted += tl.load(block_counts + b, mask=b < blocks, other=0)
    result = tl.sum(total, axis=0)
    if count is not None:
        number = tl.sum(counted, axis=0)
        tl.store(count, number.to(tl.float32))
        result = tl.where(number > 0, result / tl.maximum(number, 1), float("nan"))
    tl.store(loss, result)


@lru_cache
def tiles_of_a_part(row_tiles: int, class_tiles: int, programs: int) -> int:
    """How many tiles of classes a program walks over, so that all programs end together."""

    def time(parts: int) -> int:
        return int(triton.cdiv(row_tiles * parts, programs) * triton.cdiv(class_tiles, parts))

    # past eight rounds of programs, what more parts gain at the end is little
    most = min(class_tiles, max(1, triton.cdiv(8 * programs, row_tiles)))
    return int(triton.cdiv(class_tiles, min(range(1, most + 1), key=time)))


def losses(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    loss: Loss,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of hidden [rows features] and weight [classes features].

    Returns:
        Float32[] loss or Float32[rows] losses, Float32[rows] log-sum-exp in base 2, and for "mean"
        Float32[] rows that count.
    """
    out, lse, count = empty_losses(hidden, reduction)
    rows, classes = hidden.shape[0], weight.shape[0]
    aligned = all_fit_tma(hidden, weight)
    config = choose_product("cross_entropy_forward", hidden, classes, 1, aligned)
    blocks = triton.cdiv(rows, JOINED_ROWS)
    each = reduction == "none"
    block_losses = None if each else lse.new_empty(blocks)
    block_counts = None if each else lse.new_empty(blocks, dtype=torch.int32)
    target = target.contiguous()
    statistics = _statistics(hidden, weight, target, bias, loss, config)
    launch(
        join_parts,
        (blocks,),
        hidden.device,
        losses=out if each else None,
        lse=lse,
        block_losses=block_losses,
        block_counts=block_counts,
        **statistics._asdict(),
        target=target,
        rows=rows,
        parts=statistics.maxima.shape[0],
        ignore_index=loss.ignore_index,
        on_target=1 - loss.label_smoothing,
        on_each=loss.label_smoothing / classes,
        z_loss=loss.z_loss,
        BLOCK_ROWS=JOINED_ROWS,
    )
    if not each:
        launch(
            reduce_losses,
            (1,),
            hidden.device,
            loss=out,
            count=count if reduction == "mean" else None,
            block_losses=block_losses,
            block_counts=block_counts,
            blocks=blocks,
            BLOCK=BLOCK_SUMS,
        )
    return out, lse, count


def empty_losses(hidden: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-sum-exp, count), not yet computed; without a mean nothing is counted."""
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows if reduction == "none" else (), dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.float32),
        hidden.new_empty(() if reduction == "mean" else 0, dtype=torch.float32),
    )


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    loss: Loss,
    config: ProductLaunch,
) -> Statistics:
    (rows, features), classes = hidden.shape, weight.shape[0]
    row_tiles = triton.cdiv(rows, config.BLOCK_M)
    class_tiles = triton.cdiv(classes, config.BLOCK_N)
    tiles_each = tiles_of_a_part(max(row_tiles, 1), class_tiles, multiprocessors(hidden.device))
    parts = triton.cdiv(class_tiles, tiles_each)

    def empty() -> Tensor:
        return hidden.new_empty(parts, rows, dtype=torch.float32)

    totals = empty() if loss.label_smoothing > 0 else None
    statistics = Statistics(empty(), empty(), empty(), totals)
    options = config.options()
    del options["GROUP_M"]  # all tiles of rows go down before one part to the right
    launch(
        cross_entropy_parts,
        (row_tiles, parts),
        hidden.device,
        **statistics._asdict(),
        hidden=matrix(hidden),
        weight=matrix(weight),
        bias=contiguous(bias),
        target=target,
        softcap=loss.softcap if loss.softcap > 0 else None,
        rows=rows,
        classes=classes,
        features=features,
        tiles_each=tiles_each,
        PRECISION=product_precision(hidden.dtype),
        **options,
    )
    return statistics
