"""Attention, backward: row statistics, then keys and values, then queries, each in one kernel.

Two kernels and no atomics: every gradient is summed by one program in one order, so the results are
the same from run to run, and nothing is kept but two numbers per row. The price is that the scores
are computed twice. In the kernel for keys, tiles are transposed (keys along the first dimension):
both products then take the probabilities as their left operand, from registers.

    p = exp2(s - lse);  dp = d_out value^T;  ds = p (dp - delta);  delta = sum(out d_out)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launches
from .attention_arguments import Arguments, rows
from .attention_bias import bias_gradient
from .attention_rows import load_rows, open_rows, store_rows
from .attention_scores import (
    LOG2E,
    locate,
    probabilities,
    schedule,
    score_gradients,
    statistics_row,
    visible_columns,
    visible_rows,
    with_sink,
)
from .attention_tiles import list_columns, list_rows, tile_range, tile_start
from .philox import kept
from .runtime import dot, launch, product_precision


@triton.jit
def attention_statistics(
    out, d_out, lse_ptr, d_lse_ptr, lse2_ptr, delta_ptr, d_sink_rows_ptr, sinks, sequences,
    tiles, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Per row: base-2 log-sum-exp with the sink (inf where nothing is attended), and delta."""
    batch_head = tl.program_id(0) // tiles
    batch = batch_head // sequences.heads_q
    head = batch_head % sequences.heads_q
    start_q, len_q, _, _, _ = locate(sequences, batch)
    first_row = tl.program_id(0) % tiles * BLOCK_M
    r = first_row + tl.arange(0, BLOCK_M)
    inside = r < len_q
    source = open_rows(out, batch, head, start_q, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, False)
    o = load_rows(source, out, first_row, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, False)
    source = open_rows(d_out, batch, head, start_q, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, False)
    do = load_rows(source, d_out, first_row, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, False)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)

    row = statistics_row(sequences, batch, head, start_q) + r
    keys_only = tl.load(lse_ptr + row, mask=inside, other=float("-inf"))
    empty = keys_only == float("-inf")
    keys_only = tl.where(empty, 0.0, keys_only)
    lse = with_sink(keys_only, sinks, head)
    if d_sink_rows_ptr is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        taken = tl.where(empty, 0.0, tl.exp(sink - lse))
        tl.store(d_sink_rows_ptr + row, -taken * delta, mask=inside)
    if d_lse_ptr is not None:
        # lse counts the keys only: with a sink its probabilities are larger than those of out
        d_lse = tl.load(d_lse_ptr + row, mask=inside, other=0.0)
        delta -= tl.where(empty, 0.0, d_lse * tl.exp(lse - keys_only))
    tl.store(lse2_ptr + row, tl.where(empty, float("inf"), lse * LOG2E), mask=inside)
    tl.store(delta_ptr + row, delta, mask=inside)


@triton.jit
def attention_backward_key(
    query, key, value, d_out, d_key, d_value, lse2_ptr, delta_ptr, sequences, scores, tile_list,
    tiles, heads, section,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, ...] of d_key and d_value: over all queries of the heads that share a key head."""
    tile, batch_head = schedule(tiles, heads, section, LAST_FIRST=False)
    batch = batch_head // (sequences.heads_q // sequences.group)
    head_kv = batch_head % (sequences.heads_q // sequences.group)
    start_q, len_q, start_k, len_k, shift = locate(sequences, batch)
    first_column = tile * BLOCK_N
    source_k = open_rows(key, batch, head_kv, start_k, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
    source_v = open_rows(value, batch, head_kv, start_k, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
    k = load_rows(source_k, key, first_column, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
    v = load_rows(source_v, value, first_column, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
    columns = (first_column + tl.arange(0, BLOCK_N))[:, None]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    last_column = tl.minimum(first_column + BLOCK_N, len_k) - 1
    low, high = visible_rows(first_column, last_column, len_q, shift, scores)
    if first_column >= len_k:
        high = low
    # hoisted, what does not change would stay in registers, and the loop would spill
    for member in tl.range(sequences.group, disable_licm=True):
        head = head_kv * sequences.group + member
        source_q = open_rows(query, batch, head, start_q, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        source_do = open_rows(
            d_out, batch, head, start_q, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA
        )
        row_base = statistics_row(sequences, batch, head, start_q)
        begin, end = tile_range(tile_list, batch, head, tile, low, high, BLOCK_M)
        for i in tl.range(begin, end, disable_licm=True):
            first_row = tile_start(tile_list, batch, head, tile, i, BLOCK_M)
            r = first_row + tl.arange(0, BLOCK_M)
            rows = r[None, :]
            q = load_rows(source_q, query, first_row, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
            # rows beyond the last have an infinite sum: their probabilities are 0
            lse2 = tl.load(lse2_ptr + row_base + r, mask=r < len_q, other=float("inf"))
            # [BLOCK_N, BLOCK_M]
            s = dot(k, tl.trans(q), None, PRECISION)
            do = load_rows(source_do, d_out, first_row, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
            p, slope = probabilities(
                s, lse2[None, :], rows, columns, first_row, first_column,
                len_q, len_k, shift, batch, head, scores, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            weights = p
            if scores.dropout is not None:
                keep = kept(scores.dropout, row_base, rows, first_column, BLOCK_N)
                weights = tl.where(keep, p, 0.0)
            dv = dot(weights.to(do.dtype), do, dv, PRECISION)
            dp = dot(v, tl.trans(do), None, PRECISION)
            delta = tl.load(delta_ptr + row_base + r, mask=r < len_q, other=0.0)
            ds = score_gradients(
                p, dp, delta[None, :], rows, first_column, row_base, scores, BLOCK_N
            )
            dk = dot((ds * slope).to(q.dtype), q, dk, PRECISION)
    if scores.dropout is not None:
        dv = dv * scores.dropout.keep_scale
    length = len_k
    if sequences.cu_q is None:
        # keys beyond key_lengths have a gradient too: 0
        length = sequences.rows_k
    store_rows(
        dk * scores.scale, d_key, batch, head_kv, start_k, first_column, length,
        HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_rows(
        dv, d_value, batch, head_kv, start_k, first_column, length, HEAD_DIM_V, BLOCK_N, BLOCK_DV
    )


@triton.jit
def attention_backward_query(
    query, key, value, d_out, d_query, lse2_ptr, delta_ptr, sequences, scores, tile_list,
    tiles, heads, section,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, HEAD_DIM] of d_query: over all keys."""
    tile, batch_head = schedule(tiles, heads, section, LAST_FIRST=scores.right is not None)
    batch = batch_head // sequences.heads_q
    head = batch_head % sequences.heads_q
    head_kv = head // sequences.group
    start_q, len_q, start_k, len_k, shift = locate(sequences, batch)
    first_row = tile * BLOCK_M
    if first_row < len_q:
        source_q = open_rows(query, batch, head, start_q, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        source_do = open_rows(
            d_out, batch, head, start_q, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA
        )
        source_k = open_rows(key, batch, head_kv, start_k, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
        source_v = open_rows(
            value, batch, head_kv, start_k, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA
        )
        q = load_rows(source_q, query, first_row, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
        do = load_rows(source_do, d_out, first_row, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
        r = first_row + tl.arange(0, BLOCK_M)
        rows = r[:, None]
        row_base = statistics_row(sequences, batch, head, start_q)
        lse2 = tl.load(lse2_ptr + row_base + r, mask=r < len_q, other=float("inf"))[:, None]
        delta = tl.load(delta_ptr + row_base + r, mask=r < len_q, other=0.0)[:, None]
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        last_row = tl.minimum(first_row + BLOCK_M, len_q) - 1
        low, high = visible_columns(first_row, last_row, len_k, shift, scores)
        begin, end = tile_range(tile_list, batch, head, tile, low, high, BLOCK_N)
        # hoisted, what does not change would stay in registers, and the loop would spill
        for i in tl.range(begin, end, disable_licm=True):
            first_column = tile_start(tile_list, batch, head, tile, i, BLOCK_N)
            columns = (first_column + tl.arange(0, BLOCK_N))[None, :]
            k = load_rows(source_k, key, first_column, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
            v = load_rows(source_v, value, first_column, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
            # [BLOCK_M, BLOCK_N]
            s = dot(q, tl.trans(k), None, PRECISION)
            dp = dot(do, tl.trans(v), None, PRECISION)
            p, slope = probabilities(
                s, lse2, rows, columns, first_row, first_column,
                len_q, len_k, shift, batch, head, scores, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            ds = score_gradients(p, dp, delta, rows, first_column, row_base, scores, BLOCK_N)
            dq = dot((ds * slope).to(k.dtype), k, dq, PRECISION)
        store_rows(
            dq * scores.scale, d_query, batch, head, start_q, first_row, len_q,
            HEAD_DIM, BLOCK_M, BLOCK_D,
        )  # fmt: skip


def backward(
    a: Arguments,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    need_bias: bool,
    need_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias and sinks; the last two are empty unless needed."""
    lse2, delta, d_sinks = _statistics(a, out, lse, d_out, d_lse, need_sinks)
    d_query, d_key, d_value = empty_gradients(a)
    heads_q, heads_kv = a.heads
    common = {
        "query": rows(a.query),
        "key": rows(a.key),
        "value": rows(a.value),
        "d_out": rows(d_out),
        "lse2_ptr": lse2,
        "delta_ptr": delta,
        "sequences": a.sequences(),
        "scores": a.scores(),
        "HEAD_DIM": a.query.shape[-1],
        "HEAD_DIM_V": a.value.shape[-1],
        "BLOCK_D": launches.padded(a.query.shape[-1]),
        "BLOCK_DV": launches.padded(a.value.shape[-1]),
        "PRECISION": product_precision(a.query.dtype),
    }
    loaded = (a.query, a.key, a.value, d_out)
    config = launches.choose("attention_backward_key", a, loaded)
    tiles, heads = triton.cdiv(a.longest[1], config.BLOCK_N), a.batch * heads_kv
    launch(
        attention_backward_key,
        (tiles * heads,),
        a.query.device,
        d_key=rows(d_key),
        d_value=rows(d_value),
        tile_list=list_rows(a, config.BLOCK_M, config.BLOCK_N),
        tiles=tiles,
        heads=heads,
        section=launches.section(a),
        **common,
        **config.options(),
    )
    config = launches.choose("attention_backward_query", a, loaded)
    tiles, heads = triton.cdiv(a.longest[0], config.BLOCK_M), a.batch * heads_q
    launch(
        attention_backward_query,
        (tiles * heads,),
        a.query.device,
        d_query=rows(d_query),
        tile_list=list_columns(a, config.BLOCK_M, config.BLOCK_N),
        tiles=tiles,
        heads=heads,
        section=launches.section(a),
        **common,
        **config.options(),
    )
    d_bias = bias_gradient(a, common) if need_bias else lse.new_empty(0)
    return d_query, d_key, d_value, d_bias, d_sinks


def _statistics(
    a: Arguments, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, need_sinks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(base-2 lse with the sink, delta, d_sinks): the first two like ``lse``."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    # rows of no sequence are not visited
    d_sink_rows = torch.zeros_like(lse) if need_sinks else None
    block_d = launches.padded(a.value.shape[-1])
    block = 8192 // block_d  # 64 registers for each of the two tensors
    tiles = triton.cdiv(a.longest[0], block)
    launch(
        attention_statistics,
        (tiles * a.batch * a.heads[0],),
        a.query.device,
        out=rows(out),
        d_out=rows(d_out),
        lse_ptr=lse,
        d_lse_ptr=None if d_lse is None else d_lse.contiguous(),
        lse2_ptr=lse2,
        delta_ptr=delta,
        d_sink_rows_ptr=d_sink_rows,
        sinks=a.scores().sinks,
        sequences=a.sequences(),
        tiles=tiles,
        HEAD_DIM_V=a.value.shape[-1],
        BLOCK_M=block,
        BLOCK_DV=block_d,
        num_warps=4,
    )
    if d_sink_rows is None:
        return lse2, delta, lse.new_empty(0)
    heads = 0 if a.packed else 1
    return lse2, delta, d_sink_rows.transpose(0, heads).flatten(1).sum(1)


def empty_gradients(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """d_query, d_key, d_value: heads lie inside rows, as the projections' gradients read them.

    Packed rows that belong to no sequence are not visited: they are 0 from the start.
    """
    return tuple(_empty_like(t) for t in (a.query, a.key, a.value))  # type: ignore[return-value]


def _empty_like(x: Tensor) -> Tensor:
    if x.dim() == 3:
        return x.new_zeros(x.shape)
    batch, heads, seq, head_dim = x.shape
    return x.new_empty(batch, seq, heads, head_dim).transpose(1, 2)
