"""embedding on the CPU: csrc/cpu/embedding.inl."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.native.common import (
    _C,
    address,
    contiguous,
    dropout_arguments,
    dtype_code,
    large_empty,
    refusal,
)
from llmos_fast.reference import embedding as definition


def unsupported(*, weight: Tensor, positions: Tensor | None, **_: object) -> str | None:
    """Needs a CPU table in fp32 or bf16, its rows contiguous."""
    reason = refusal(weight, positions)
    if reason is None and weight.stride(1) != 1 and weight.shape[1] > 1:
        return f"needs contiguous rows of weight, got strides {weight.stride()}"
    return reason


def forward(
    *,
    ids: Tensor,
    weight: Tensor,
    scale: float,
    positions: Tensor | None,
    seq_dim: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.embedding."""
    return _embedding(ids, weight, positions, seq_dim, scale, dropout_p, seed)  # type: ignore[no-any-return]


def _rows(
    ids: Tensor,
    weight: Tensor,
    seq_dim: int,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """Struct EmbeddingRows of csrc/cpu/kernels.h; ``ids`` must be contiguous."""
    seq, inner = (ids.shape[seq_dim], prod(ids.shape[seq_dim + 1 :])) if ids.dim() else (1, 1)
    sizes = (ids.numel(), *weight.shape, seq, inner)
    options = (dtype_code(weight.dtype), scale, *dropout_arguments(seed, p))
    return (ids.data_ptr(), ids.dtype == torch.int64, *sizes, *options)


def _forward_cpu(
    ids: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    seq_dim: int,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    ids = ids.contiguous()
    positions = contiguous(positions)
    out = torch.empty((*ids.shape, weight.shape[1]), dtype=weight.dtype)
    _C.embedding_forward(
        *_rows(ids, weight, seq_dim, scale, p, seed),
        weight.data_ptr(),
        address(positions),
        out.data_ptr(),
        weight.stride(0),
    )
    return out


def _forward_fake(ids: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, positions, ctx.seq_dim, ctx.scale, ctx.p, seed = inputs
    ctx.save_for_backward(ids, weight, positions, seed)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    ids, weight, positions, seed = ctx.saved_tensors
    if torch.is_grad_enabled():
        rest = {"ids": ids, "seq_dim": ctx.seq_dim, "scale": ctx.scale}
        rest |= {"dropout_p": ctx.p, "seed": seed}
        tensors = {"weight": weight, "positions": positions}
        d_weight, d_positions = second_order(definition, tensors, rest, (d_out,)).values()
    else:
        options = (ctx.seq_dim, ctx.scale, ctx.p, seed)
        d_weight, d_positions = _embedding_backward(d_out, ids, weight, positions, *options)
    need_positions = ctx.needs_input_grad[2]
    return None, d_weight, d_positions if need_positions else None, None, None, None, None


def _backward_cpu(
    d_out: Tensor,
    ids: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    seq_dim: int,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    ids, d_out = ids.contiguous(), d_out.contiguous()
    d_weight = large_empty(*weight.shape)
    d_positions = torch.empty(() if positions is None else positions.shape)
    _C.embedding_backward(
        *_rows(ids, weight, seq_dim, scale, p, seed),
        d_out.data_ptr(),
        d_weight.data_ptr(),
        0 if positions is None else d_positions.data_ptr(),
    )
    return d_weight.to(weight.dtype), d_positions.to(weight.dtype)


def _backward_fake(
    d_out: Tensor, ids: Tensor, weight: Tensor, positions: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    d_positions = weight.new_empty(() if positions is None else positions.shape)
    return weight.new_empty(weight.shape), d_positions


_OPTIONS = "int seq_dim, float scale, float dropout_p, Tensor? seed"
_embedding = differentiable(
    f"embedding(Tensor ids, Tensor weight, Tensor? positions, {_OPTIONS}) -> Tensor",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
_embedding_backward = register(
    f"embedding_backward(Tensor d_out, Tensor ids, Tensor weight, Tensor? positions, {_OPTIONS}) "
    "-> (Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
