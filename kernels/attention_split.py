"""Attention to a cache, split over its keys: the kernel, whose last block joins the parts.

A program takes BLOCK_M rows, which are queries times the query heads of one KV head, over one split
of the keys (flash-decoding, Dao et al. 2023). Where a sequence has more than one split, each leaves
its maximum, sum and values in a workspace; the block that arrives last adds them up, in the order
of the splits, so that the result does not depend on who was last. There is no second launch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_scores import LOG2E, score_factor, transform, visible, visible_columns
from .runtime import INTERPRETED, dot

# maxima that the block that joins reads at once
_CHUNK = tl.constexpr(32)
_INTERPRETED = tl.constexpr(INTERPRETED)


class Pages(NamedTuple):
    """Where the pages of a sequence lie: Int[batch per_sequence], of a cache of ``total`` pages."""

    table: Tensor
    per_sequence: int
    total: int


class Factors(NamedTuple):
    """Scales of a quantized cache, broadcast to its [pages or batch, heads_kv, rows]."""

    ptr: Tensor
    page_stride: int
    head_stride: int
    row_stride: int


class Partials(NamedTuple):
    """What the splits leave for the last block.

    Attributes:
        acc: Float32[programs splits BLOCK_M BLOCK_DV].
        statistics: Float32[programs splits 2 BLOCK_M], maxima in base 2 and sums.
        counters: Int32[programs], splits that have arrived; 0 before and after a launch.
    """

    acc: Tensor
    statistics: Tensor
    counters: Tensor


# these grow with the cache: a kernel must not be compiled anew where they happen to divide by 16
@triton.jit(do_not_specialize=["capacity", "splits"])
def attention_split(
    query, key, value, out, cache_lengths, pages, key_factors, value_factors, scores, partials,
    heads_kv, group, seq_q, capacity, splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, JOIN_STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of ``out``, or this split's part of them."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    tiles = tl.cdiv(group * seq_q, BLOCK_M)
    head_kv = program // tiles % heads_kv
    batch = program // tiles // heads_kv
    length = tl.minimum(tl.maximum(tl.load(cache_lengths + batch), 0), capacity).to(tl.int32)
    low, high = visible_columns(0, seq_q - 1, length, length - seq_q, scores)
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_N)
    blocks_each = tl.maximum(tl.cdiv(blocks, splits), 1)
    # a sequence without keys has one split too, which writes its zeros
    parts = tl.maximum(tl.cdiv(blocks, blocks_each), 1)
    if split >= parts:
        return

    row = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    index = row // group
    head = head_kv * group + row % group
    exists = index < seq_q
    q = tl.load(
        _pointers(query, batch, head, index, BLOCK_D),
        mask=_inside(exists, HEAD_DIM, BLOCK_D),
        other=0.0,
    )
    start = low + split * blocks_each * BLOCK_N
    stop = tl.minimum(start + blocks_each * BLOCK_N, high)
    m_i, l_i, acc = _attend(
        q, key, value, pages, key_factors, value_factors, scores,
        batch, head_kv, head, index, seq_q, length, start, stop,
        HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    arrived = parts - 1
    # None is decided when the kernel is compiled, the rest when it runs
    if partials is not None:  # noqa: SIM102
        if parts > 1:
            first_part = program.to(tl.int64) * splits
            _leave(partials, first_part + split, m_i, l_i, acc, exists, BLOCK_M, BLOCK_DV)
            # the counter stands for what all threads of the block have written
            tl.debug_barrier()
            counter = partials.counters + program
            arrived = tl.atomic_add(counter, 1, sem="acq_rel")
            if arrived == parts - 1:
                tl.store(counter, 0)
                m_i, l_i, acc = _join(
                    partials, first_part, parts, exists, BLOCK_M, BLOCK_DV, JOIN_STAGES
                )
    if arrived == parts - 1:
        if scores.sinks is not None:
            sink = tl.load(scores.sinks + head).to(tl.float32) * LOG2E
            m_all = tl.maximum(m_i, sink)
            m_safe = tl.where(m_all == float("-inf"), 0.0, m_all)
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.exp2(sink - m_safe)
            acc = acc * alpha[:, None]
        tile = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
        tl.store(
            _pointers(out, batch, head, index, BLOCK_DV),
            tile.to(out.ptr.dtype.element_ty),
            mask=_inside(exists, HEAD_DIM_V, BLOCK_DV),
        )


@triton.jit
def _attend(
    q, key, value, pages, key_factors, value_factors, scores,
    batch, head_kv, head, index, seq_q, length, start, stop,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(maxima in base 2, sums, values not yet divided) over the keys start..stop - 1."""
    factor = score_factor(scores)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    rows = index[:, None]
    shift = length - seq_q
    for first in tl.range(start, stop, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        filled = column < stop
        columns = column[None, :]
        page, page_row = _locate(pages, batch, column, filled, PAGE_SIZE)
        k = tl.load(
            _pointers(key, page, head_kv, page_row, BLOCK_D),
            mask=_inside(filled, HEAD_DIM, BLOCK_D),
            other=0.0,
        )
        # [BLOCK_M, BLOCK_N]
        s = dot(q, tl.trans(_in_dtype_of(q, k)), None, PRECISION)
        if key_factors is not None:
            s = s * _load_factors(key_factors, page, head_kv, page_row, filled)[None, :]
        s, _ = transform(s, rows, columns, seq_q, stop, shift, batch, head[:, None], scores)
        allowed = visible(rows, columns, seq_q, stop, shift, batch, head[:, None], scores)
        s = tl.where(allowed, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
        # a row without a key so far would give -inf - -inf = NaN
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * factor - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(
            _pointers(value, page, head_kv, page_row, BLOCK_DV),
            mask=_inside(filled, HEAD_DIM_V, BLOCK_DV),
            other=0.0,
        )
        v = _in_dtype_of(q, v)
        if value_factors is not None:
            # not into p: fp16 would underflow where a factor is small
            factors = _load_factors(value_factors, page, head_kv, page_row, filled)
            v = (v.to(tl.float32) * factors[:, None]).to(q.dtype)
        acc = dot(p.to(q.dtype), v, acc * alpha[:, None], PRECISION)
        m_i = m_new
    return m_i, l_i, acc


@triton.jit
def _in_dtype_of(q, cached):
    """Elements of a cache, exactly, in the dtype of the products."""
    if _INTERPRETED and cached.dtype.is_int():
        # numpy has no bf16: the interpreter would take the integers for its bits
        cached = cached.to(tl.float32)
    return cached.to(q.dtype)


@triton.jit
def _locate(pages, batch, column, filled, PAGE_SIZE: tl.constexpr):
    """(page, row in it) of key positions; a dense cache has one page per sequence."""
    if pages is None:
        page, page_row = batch, column
    else:
        entry = pages.table + batch.to(tl.int64) * pages.per_sequence + column // PAGE_SIZE
        page = tl.load(entry, mask=filled, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages.total - 1)
        page_row = column % PAGE_SIZE
    return page, page_row


@triton.jit
def _pointers(rows, batch, head, row, COLUMNS: tl.constexpr):
    """[rows, COLUMNS] addresses in a tensor [batch heads rows columns]."""
    offset = batch.to(tl.int64) * rows.batch_stride + head.to(tl.int64) * rows.head_stride
    offset += row.to(tl.int64) * rows.row_stride
    return rows.ptr + offset[:, None] + (tl.arange(0, COLUMNS) * rows.column_stride)[None, :]


@triton.jit
def _inside(rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] mask of the rows that exist and the columns below COLUMNS."""
    inside = rows[:, None]
    if COLUMNS != BLOCK:
        inside = inside & (tl.arange(0, BLOCK) < COLUMNS)[None, :]
    return inside


@triton.jit
def _load_factors(factors, page, head_kv, page_row, filled):
    offset = page.to(tl.int64) * factors.page_stride + head_kv.to(tl.int64) * factors.head_stride
    offset += page_row.to(tl.int64) * factors.row_stride
    return tl.load(factors.ptr + offset, mask=filled, other=0.0).to(tl.float32)


@triton.jit
def _leave(partials, part, m_i, l_i, acc, exists, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Write one split's part into the workspace."""
    r = tl.arange(0, BLOCK_M)
    statistics = partials.statistics + part * (2 * BLOCK_M) + r
    tl.store(statistics, m_i, mask=exists)
    tl.store(statistics + BLOCK_M, l_i, mask=exists)
    offsets = r[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    values = partials.acc + part * (BLOCK_M * BLOCK_DV) + offsets
    tl.store(values, acc, mask=exists[:, None])


@triton.jit
def _join(
    partials, first_part, parts, exists,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, JOIN_STAGES: tl.constexpr,
):  # fmt: skip
    """(maxima, sums, values) of all splits together.

    ``.cg`` reads past the L1 cache, which does not see what other processors write.
    """
    r = tl.arange(0, BLOCK_M)
    statistics = partials.statistics + first_part * (2 * BLOCK_M) + r
    m_all = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for chunk in range(0, parts, _CHUNK):
        part = chunk + tl.arange(0, _CHUNK)
        maxima = tl.load(
            statistics[None, :] + part[:, None] * (2 * BLOCK_M),
            mask=(part < parts)[:, None] & exists[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        m_all = tl.maximum(m_all, tl.max(maxima, 0))
    m_safe = tl.where(m_all == float("-inf"), 0.0, m_all)
    l_all = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    offsets = r[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    values = partials.acc + first_part * (BLOCK_M * BLOCK_DV) + offsets
    for part in tl.range(0, parts, num_stages=JOIN_STAGES):
        maxima = statistics + part * (2 * BLOCK_M)
        m_part = tl.load(maxima, mask=exists, other=float("-inf"), cache_modifier=".cg")
        l_part = tl.load(maxima + BLOCK_M, mask=exists, other=0.0, cache_modifier=".cg")
        tile = tl.load(
            values + part * (BLOCK_M * BLOCK_DV),
            mask=exists[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        weight = tl.exp2(m_part - m_safe)
        l_all += weight * l_part
        acc += weight[:, None] * tile
    return m_all, l_all, acc
