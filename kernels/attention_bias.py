"""Attention, gradient of the bias: summed in the bias's own shape, in one fixed order.

A program owns a tile of the bias and walks over whatever it was broadcast along, computing the
scores' gradients anew: no atomics, and no tensor of all scores where the bias is smaller.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as launches
from .attention_arguments import Arguments, plane
from .attention_rows import load_rows, open_rows
from .attention_scores import (
    locate,
    probabilities,
    score_gradients,
    statistics_row,
    visible_columns,
)
from .runtime import dot, launch, wide


@triton.jit
def attention_backward_bias(
    query, key, value, d_out, d_bias, lse2_ptr, delta_ptr, sequences, scores,
    tiles, batches, heads, bias_batches, bias_heads, row_tiles, column_tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of d_bias in the bias's own shape: sums over whatever it was broadcast along."""
    tile = tl.program_id(0) % tiles
    bias_batch = tl.program_id(0) // tiles // bias_heads
    bias_head = tl.program_id(0) // tiles % bias_heads
    row_begin = 0
    row_end = row_tiles
    column_begin = 0
    column_end = column_tiles
    if d_bias.row_stride is not None:
        row_begin = tile % row_tiles
        row_end = row_begin + 1
        tile = tile // row_tiles
    if d_bias.column_stride is not None:
        column_begin = tile
        column_end = tile + 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # hoisted, what does not change would stay in registers, and the loops would spill
    for batch in tl.range(bias_batch, batches, bias_batches, disable_licm=True):
        _, len_q, _, len_k, shift = locate(sequences, batch)
        for head in tl.range(bias_head, heads, bias_heads, disable_licm=True):
            head_kv = head // sequences.group
            row_base = statistics_row(sequences, batch, head, 0)
            source_q = open_rows(query, batch, head, 0, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, False)
            source_do = open_rows(
                d_out, batch, head, 0, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, False
            )
            source_k = open_rows(key, batch, head_kv, 0, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, False)
            source_v = open_rows(
                value, batch, head_kv, 0, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, False
            )
            for row_tile in tl.range(row_begin, row_end, disable_licm=True):
                first_row = row_tile * BLOCK_M
                q = load_rows(source_q, query, first_row, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, False)
                do = load_rows(
                    source_do, d_out, first_row, len_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, False
                )
                r = first_row + tl.arange(0, BLOCK_M)
                lse2 = tl.load(lse2_ptr + row_base + r, mask=r < len_q, other=float("inf"))
                delta = tl.load(delta_ptr + row_base + r, mask=r < len_q, other=0.0)
                low, high = visible_columns(
                    first_row, first_row + BLOCK_M - 1, len_k, shift, scores
                )
                begin = tl.maximum(column_begin, low // BLOCK_N)
                end = tl.minimum(column_end, tl.cdiv(high, BLOCK_N))
                for column_tile in tl.range(begin, end, disable_licm=True):
                    first_column = column_tile * BLOCK_N
                    columns = (first_column + tl.arange(0, BLOCK_N))[None, :]
                    k = load_rows(
                        source_k, key, first_column, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, False
                    )
                    v = load_rows(
                        source_v, value, first_column, len_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, False
                    )
                    s = dot(q, tl.trans(k), None, PRECISION)
                    dp = dot(do, tl.trans(v), None, PRECISION)
                    p, _slope = probabilities(
                        s, lse2[:, None], r[:, None], columns, first_row, first_column,
                        len_q, len_k, shift, batch, head, scores, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    total += score_gradients(
                        p, dp, delta[:, None], r[:, None], first_column, row_base, scores, BLOCK_N
                    )
    base = d_bias.ptr + wide(bias_batch) * d_bias.batch_stride
    base += wide(bias_head) * d_bias.head_stride
    r = row_begin * BLOCK_M + tl.arange(0, BLOCK_M)
    c = column_begin * BLOCK_N + tl.arange(0, BLOCK_N)
    if d_bias.row_stride is None:
        if d_bias.column_stride is None:
            tl.store(base, tl.sum(tl.sum(total, 1), 0).to(d_bias.ptr.dtype.element_ty))
        else:
            tl.store(base + c * d_bias.column_stride, tl.sum(total, 0), mask=c < sequences.rows_k)
    elif d_bias.column_stride is None:
        pointers = base + wide(r) * d_bias.row_stride
        tl.store(pointers, tl.sum(total, 1), mask=r < sequences.rows_q)
    else:
        pointers = base + wide(r)[:, None] * d_bias.row_stride
        pointers += c[None, :] * d_bias.column_stride
        inside = (r[:, None] < sequences.rows_q) & (c[None, :] < sequences.rows_k)
        tl.store(pointers, total, mask=inside)


def bias_gradient(a: Arguments, common: dict[str, Any]) -> Tensor:
    """d_bias in the shape and dtype of ``a.bias``; ``common`` is what backward kernels share."""
    assert a.bias is not None
    d_bias = torch.empty(a.bias.shape, dtype=a.bias.dtype, device=a.bias.device)
    bias_batches, bias_heads, bias_rows, bias_columns = (1, 1, 1, 1, *a.bias.shape)[-4:]
    config = launches.choose("attention_backward_bias", a, ())
    row_tiles = triton.cdiv(a.longest[0], config.BLOCK_M)
    column_tiles = triton.cdiv(a.longest[1], config.BLOCK_N)
    tiles = (row_tiles if bias_rows > 1 else 1) * (column_tiles if bias_columns > 1 else 1)
    launch(
        attention_backward_bias,
        (tiles * bias_batches * bias_heads,),
        a.query.device,
        tiles=tiles,
        d_bias=plane(d_bias, a.scores_shape),
        batches=a.batch,
        heads=a.heads[0],
        bias_batches=bias_batches,
        bias_heads=bias_heads,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        **common,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return d_bias
