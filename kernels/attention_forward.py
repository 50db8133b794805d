"""Attention, forward: one program computes BLOCK_M queries of one head over all their keys.

Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): m_i is the running maximum of a row in
base 2, l_i its sum of exponentials, acc its sum of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launches
from .attention_arguments import Arguments, rows
from .attention_rows import load_rows, open_rows, store_rows
from .attention_scores import (
    LN2,
    LOG2E,
    hides_some,
    locate,
    schedule,
    score_factor,
    statistics_row,
    transform,
    visible,
    visible_columns,
)
from .attention_tiles import list_columns, tile_range, tile_start
from .philox import kept
from .runtime import dot, launch, product_precision


@triton.jit
def attention_forward(
    query, key, value, out, lse_ptr, sequences, scores, tile_list, tiles, heads, section,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_DV] of ``out``, and BLOCK_M log-sum-exps."""
    tile, batch_head = schedule(tiles, heads, section, LAST_FIRST=scores.right is not None)
    batch = batch_head // sequences.heads_q
    head = batch_head % sequences.heads_q
    head_kv = head // sequences.group
    start_q, len_q, start_k, len_k, shift = locate(sequences, batch)
    first_row = tile * BLOCK_M
    if first_row < len_q:
        source_q = open_rows(query, batch, head, start_q, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        source_k = open_rows(key, batch, head_kv, start_k, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        source_v = open_rows(
            value, batch, head_kv, start_k, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA
        )
        q = load_rows(source_q, query, first_row, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        row_base = statistics_row(sequences, batch, head, start_q)
        rows_ = (first_row + tl.arange(0, BLOCK_M))[:, None]
        factor = score_factor(scores)
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

        last_row = tl.minimum(first_row + BLOCK_M, len_q) - 1
        low, high = visible_columns(first_row, last_row, len_k, shift, scores)
        begin, end = tile_range(tile_list, batch, head, tile, low, high, BLOCK_N)
        # hoisted, what does not change would stay in registers, and the loop would spill
        for i in tl.range(begin, end, warp_specialize=WARP_SPECIALIZE, disable_licm=True):
            first_column = tile_start(tile_list, batch, head, tile, i, BLOCK_N)
            columns = (first_column + tl.arange(0, BLOCK_N))[None, :]
            k = load_rows(source_k, key, first_column, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
            # [BLOCK_M, BLOCK_N]
            s = dot(q, tl.trans(k), None, PRECISION)
            s, _ = transform(s, rows_, columns, len_q, len_k, shift, batch, head, scores)
            if WARP_SPECIALIZE:
                # a branch would end the specialisation
                allowed = visible(rows_, columns, len_q, len_k, shift, batch, head, scores)
                s = tl.where(allowed, s, float("-inf"))
            elif hides_some(first_row, first_column, len_k, shift, scores, BLOCK_M, BLOCK_N):
                allowed = visible(rows_, columns, len_q, len_k, shift, batch, head, scores)
                s = tl.where(allowed, s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1) * factor)
            # a row without a key so far would give -inf - -inf = NaN
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * factor - m_safe[:, None])
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, 1)
            if scores.dropout is not None:
                keep = kept(scores.dropout, row_base, rows_, first_column, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = load_rows(source_v, value, first_column, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
            acc = dot(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
            m_i = m_new

        r = first_row + tl.arange(0, BLOCK_M)
        # m_i is -inf where l_i is 0, and 0 is not shown to the logarithm
        lse = m_i * LN2 + tl.log(tl.where(l_i == 0.0, 1.0, l_i))
        tl.store(lse_ptr + row_base + r, lse, mask=r < len_q)
        if scores.sinks is not None:
            sink = tl.load(scores.sinks + head).to(tl.float32) * LOG2E
            m_new = tl.maximum(m_i, sink)
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.exp2(sink - m_safe)
            acc = acc * alpha[:, None]
        inverse = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
        if scores.dropout is not None:
            inverse = inverse * scores.dropout.keep_scale
        store_rows(
            acc * inverse[:, None], out, batch, head, start_q, first_row, len_q,
            HEAD_DIM_V, BLOCK_M, BLOCK_DV,
        )  # fmt: skip


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op, as its contract says."""
    out, lse = empty_outputs(a)
    head_dim, head_dim_v = a.query.shape[-1], a.value.shape[-1]
    config = launches.choose("attention_forward", a, (a.query, a.key, a.value))
    tiles = triton.cdiv(a.longest[0], config.BLOCK_M)
    heads = a.batch * a.heads[0]
    launch(
        attention_forward,
        (tiles * heads,),
        a.query.device,
        query=rows(a.query),
        key=rows(a.key),
        value=rows(a.value),
        out=rows(out),
        lse_ptr=lse,
        sequences=a.sequences(),
        scores=a.scores(),
        tile_list=list_columns(a, config.BLOCK_M, config.BLOCK_N),
        tiles=tiles,
        heads=heads,
        section=launches.section(a),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        BLOCK_D=launches.padded(head_dim),
        BLOCK_DV=launches.padded(head_dim_v),
        PRECISION=product_precision(a.query.dtype),
        WARP_SPECIALIZE=config.WARP_SPECIALIZE,
        **config.options(),
    )
    return out, lse


def empty_outputs(a: Arguments) -> tuple[Tensor, Tensor]:
    """(out, lse): heads lie inside rows, as the output projection reads them.

    Packed rows that belong to no sequence are not visited: they are 0 and -inf from the start.
    """
    head_dim_v = a.value.shape[-1]
    if a.packed:
        total, heads, _ = a.query.shape
        out = a.query.new_zeros(total, heads, head_dim_v)
        return out, a.query.new_full((heads, total), -torch.inf, dtype=torch.float32)
    batch, heads, seq_q, _ = a.query.shape
    out = a.query.new_empty(batch, seq_q, heads, head_dim_v).transpose(1, 2)
    return out, a.query.new_empty((batch, heads, seq_q), dtype=torch.float32)
