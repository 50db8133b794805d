"""attention_weights on the GPU: attention's own kernels, and one that computes its weights again.

The forward kernel leaves a log-sum-exp per row, from which every probability follows by itself:

    weights = dropout(exp2(s - lse))

A program computes one tile of the scores, and its mean over the heads in registers where that is
asked for, in the order of the heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.library import differentiable, second_order
from llmos_fast.reference import attention_weights as definition

from .attention import SCHEMA, attention, definition_call, save_arguments, saved_arguments
from .attention import unsupported as attention_unsupported
from .attention_arguments import Arguments, rows
from .attention_rows import open_rows
from .attention_scores import (
    LOG2E,
    locate,
    probabilities,
    statistics_row,
    visible_columns,
    with_sink,
)
from .philox import kept
from .runtime import DEVICES, architecture, dot, launch, product_precision, wide


@dataclass(frozen=True)
class WeightsLaunch:
    """How the kernel is cut into tiles and given warps.

    Attributes:
        BLOCK_M: query rows of a tile.
        BLOCK_N: key columns of a tile.
        BLOCK_D: features that are loaded and multiplied at a time.
        num_warps: of a program.
        num_stages: steps of BLOCK_D features that are loaded ahead.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@triton.jit
def attention_weights(
    query, key, lse_ptr, weights_ptr, sequences, scores, row_tiles, column_tiles, heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the weights of one head, or of the mean of ``heads`` heads."""
    column_tile = tl.program_id(0) % column_tiles
    row_tile = tl.program_id(0) // column_tiles % row_tiles
    plane = tl.program_id(0) // column_tiles // row_tiles
    batch = plane * heads // sequences.heads_q
    first_head = plane * heads % sequences.heads_q
    start_q, len_q, start_k, len_k, shift = locate(sequences, batch)
    first_row = row_tile * BLOCK_M
    first_column = column_tile * BLOCK_N
    r = first_row + tl.arange(0, BLOCK_M)
    c = first_column + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last_row = tl.minimum(first_row + BLOCK_M, len_q) - 1
    low, high = visible_columns(first_row, last_row, len_k, shift, scores)
    if (first_column < high) & (first_column + BLOCK_N > low):
        for head in range(first_head, first_head + heads):
            head_kv = head // sequences.group
            q_rows = open_rows(
                query, batch, head, start_q, len_q, HEAD_DIM, BLOCK_M, BLOCK_D, False
            )
            k_rows = open_rows(
                key, batch, head_kv, start_k, len_k, HEAD_DIM, BLOCK_N, BLOCK_D, False
            )
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first_feature in range(0, HEAD_DIM, BLOCK_D):
                d = first_feature + tl.arange(0, BLOCK_D)
                q = _load_features(q_rows, query, r, len_q, d, HEAD_DIM)
                k = _load_features(k_rows, key, c, len_k, d, HEAD_DIM)
                s = dot(q, tl.trans(k), s, PRECISION)
            row_base = statistics_row(sequences, batch, head, start_q)
            lse = tl.load(lse_ptr + row_base + r, mask=r < len_q, other=0.0)
            # a row without a key has scores of -inf too, and -inf - -inf would be NaN
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            lse2 = with_sink(lse, scores.sinks, head) * LOG2E
            p, _ = probabilities(
                s, lse2[:, None], r[:, None], c[None, :], first_row, first_column,
                len_q, len_k, shift, batch, head, scores, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if scores.dropout is not None:
                keep = kept(scores.dropout, row_base, r[:, None], first_column, BLOCK_N)
                p = tl.where(keep, p * scores.dropout.keep_scale, 0.0)
            total += p
    pointers = weights_ptr + (wide(plane) * len_q + r[:, None]) * sequences.rows_k + c[None, :]
    inside = (r[:, None] < len_q) & (c[None, :] < sequences.rows_k)
    tl.store(pointers, (total / heads).to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_features(base, rows, r, length, d, HEAD_DIM: tl.constexpr):
    """Features ``d`` of rows ``r`` of a sequence, zeros outside of it."""
    pointers = base + wide(r)[:, None] * rows.row_stride + d[None, :] * rows.column_stride
    return tl.load(pointers, mask=(r[:, None] < length) & (d[None, :] < HEAD_DIM), other=0.0)


def choose_launch(arch: int, element_size: int) -> WeightsLaunch:
    """The launch for queries of ``element_size`` bytes, whatever their head_dim."""
    if arch == 0:
        return WeightsLaunch(32, 32, 32, num_warps=4, num_stages=1)
    if element_size == 2:
        return WeightsLaunch(64, 64, 64, num_warps=8, num_stages=3)
    # fp32 takes three tf32 products, which would spill registers with larger tiles
    return WeightsLaunch(64, 32, 32, num_warps=4, num_stages=3)


def unsupported(**call: Any) -> str | None:
    """As attention."""
    return attention_unsupported(**call)


def forward(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: str,
    key_lengths: Tensor | None,
    packed: None,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    average_heads: bool,
) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.attention_weights."""
    a = Arguments(
        query, key, value, mask, bias, key_lengths, None, None, 0, 0, alibi_slopes, sinks,
        causal, *window, softcap, dropout_p, seed, scale,
    )  # fmt: skip
    out, lse = attention(*a)
    return out, _weights(*a, lse.detach(), average_heads)


def recompute(a: Arguments, lse: Tensor, average_heads: bool) -> Tensor:
    """The weights of a call whose log-sum-exps, without sinks, are known."""
    weights = _empty_weights(a, average_heads)
    batch, heads_q, seq_q, seq_k = a.scores_shape
    head_dim = a.query.shape[-1]
    config = choose_launch(architecture(a.query.device), a.query.element_size())
    row_tiles, column_tiles = triton.cdiv(seq_q, config.BLOCK_M), triton.cdiv(seq_k, config.BLOCK_N)
    launch(
        attention_weights,
        (row_tiles * column_tiles * batch * (1 if average_heads else heads_q),),
        a.query.device,
        query=rows(a.query),
        key=rows(a.key),
        lse_ptr=lse,
        weights_ptr=weights,
        sequences=a.sequences(),
        scores=a.scores(),
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        heads=heads_q if average_heads else 1,
        HEAD_DIM=head_dim,
        PRECISION=product_precision(a.query.dtype),
        **asdict(config),
    )
    return weights


def _empty_weights(a: Arguments, average_heads: bool) -> Tensor:
    batch, heads_q, *plane = a.scores_shape
    return a.query.new_empty((batch, *plane) if average_heads else (batch, heads_q, *plane))


def _forward(*arguments: Any) -> Tensor:
    *call, lse, average_heads = arguments
    return recompute(Arguments(*call), lse, average_heads)


def _forward_fake(*arguments: Any) -> Tensor:
    *call, _, average_heads = arguments
    return _empty_weights(Arguments(*call), average_heads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *call, _, ctx.average_heads = inputs
    save_arguments(ctx, tuple(call))


def _backward(ctx: Any, d_weights: Tensor) -> tuple[Tensor | None, ...]:
    """Through the definition: a gradient of the weights is as large as all of them anyway."""
    a, _ = saved_arguments(ctx)
    tensors, rest = definition_call(a)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        gradients = second_order(
            definition,
            tensors,
            rest | {"average_heads": ctx.average_heads},
            (None, d_weights),
            create_graph,
        )
    return (*(gradients.get(name) for name in Arguments._fields), None, None)


_weights = differentiable(
    f"attention_weights_triton({SCHEMA}, Tensor lse, bool average_heads) -> Tensor",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
