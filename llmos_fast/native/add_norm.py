"""add_norm and dropout on the CPU: csrc/cpu/add_norm.inl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.dropout import dropout_rows
from llmos_fast.library import differentiable, register, second_order
from llmos_fast.native.common import (
    _C,
    address,
    contiguous,
    dropout_arguments,
    dtype_code,
    large_empty,
    refusal,
    rows_contiguous,
)
from llmos_fast.reference import add_norm as definition


def unsupported(*, x: Tensor, residual: Tensor | None, **_: object) -> str | None:
    """Needs CPU tensors in fp32 or bf16; a bf16 residual takes a bf16 x."""
    reason = refusal(x, residual)
    if reason is None and residual is not None and residual.dtype == torch.bfloat16 != x.dtype:
        return "needs a residual that is not narrower than x, got bfloat16 under float32"
    return reason


def forward(
    *,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.add_norm."""
    rms = kind == "rms"
    norm, total, _, _ = _add_norm(x, residual, weight, bias, rms, eps, dropout_p, seed)
    return norm, total


def _total_like(x: Tensor, residual: Tensor | None) -> Tensor:
    return large_empty(*x.shape, dtype=x.dtype if residual is None else residual.dtype)


def _affine(parameter: Tensor | None) -> tuple[Tensor | None, int]:
    """``parameter`` as the kernel reads it, in fp32 or bf16, and the code of its dtype."""
    if parameter is None:
        return None, 0
    if parameter.dtype != torch.bfloat16:
        parameter = parameter.float()
    return parameter.contiguous(), dtype_code(parameter.dtype)


def _forward_cpu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = contiguous(residual)
    scale, scale_code = _affine(weight)
    offset, offset_code = _affine(bias)
    total = _total_like(x, residual)
    norm = large_empty(*total.shape, dtype=total.dtype)
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    x = rows_contiguous(x if x.dim() <= 4 else x.reshape(rows, columns))
    missing = 4 - x.dim()
    _, heads, seq, _ = (1,) * missing + x.shape
    strides = ((0,) * missing + x.stride())[:3]
    mean, rstd = torch.empty(0 if rms else rows), torch.empty(rows)
    _C.add_norm_forward(
        x.data_ptr(),
        address(residual),
        address(scale),
        address(offset),
        norm.data_ptr(),
        total.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        rows,
        columns,
        heads,
        seq,
        *strides,
        dtype_code(x.dtype),
        dtype_code(total.dtype),
        scale_code,
        offset_code,
        rms,
        eps,
        *dropout_arguments(seed, p),
    )
    return norm, total, mean, rstd


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    rows = x.numel() // max(x.shape[-1], 1)
    statistics = x.new_empty(rows, dtype=torch.float32)
    mean = x.new_empty(0 if rms else rows, dtype=torch.float32)
    return torch.empty_like(total), total, mean, statistics


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weight, bias, ctx.rms, ctx.eps, ctx.p, seed = inputs
    _, total, mean, rstd = output
    ctx.x_is_bf16 = x.dtype == torch.bfloat16
    ctx.save_for_backward(weight, bias, seed, total, mean, rstd)


def _backward(
    ctx: Any, d_norm: Tensor | None, d_total: Tensor | None, _mean: None, _rstd: None
) -> tuple[Tensor | None, ...]:
    weight, bias, seed, total, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradients = _differentiable_backward(ctx, d_norm, d_total)
    else:
        d_x, d_residual, d_weight, d_bias = _add_norm_backward(
            d_norm,
            d_total,
            total,
            weight,
            mean,
            rstd,
            ctx.x_is_bf16,
            ctx.needs_input_grad[1],
            ctx.rms,
            ctx.p,
            seed,
        )
        gradients = (
            d_x,
            d_residual,
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
        )
    needed = zip(gradients, ctx.needs_input_grad, strict=False)
    return (*(g if need else None for g, need in needed), None, None, None, None)


def _differentiable_backward(
    ctx: Any, d_norm: Tensor | None, d_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of gradients need no input but ``total``, an output that autograd knows."""
    weight, bias, seed, total, _, _ = ctx.saved_tensors
    found = second_order(
        definition,
        {"x": total, "weight": weight, "bias": bias},
        {
            "residual": None,
            "kind": "rms" if ctx.rms else "layer",
            "eps": ctx.eps,
            "dropout_p": 0.0,
            "seed": None,
        },
        (d_norm,),
    )
    parts = [g for g in (found["x"], d_total) if g is not None]
    d_full = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    d_x = dropout_rows(d_full, seed, ctx.p).to(torch.bfloat16 if ctx.x_is_bf16 else torch.float32)
    return d_x, d_full, found["weight"], found["bias"]


def _backward_cpu(
    d_norm: Tensor | None,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_is_bf16: bool,
    with_residual: bool,
    rms: bool,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = total.shape[-1]
    rows = total.numel() // max(columns, 1)
    d_norm = contiguous(d_norm)
    d_total = contiguous(d_total)
    scale = None if weight is None else weight.float().contiguous()
    x_dtype = torch.bfloat16 if x_is_bf16 else torch.float32
    d_x = large_empty(*total.shape, dtype=x_dtype)
    d_residual = large_empty(*total.shape, dtype=total.dtype) if with_residual else torch.empty(0)
    d_weight, d_bias = torch.empty(columns), torch.empty(columns)
    _C.add_norm_backward(
        address(d_norm),
        address(d_total),
        total.data_ptr(),
        address(scale),
        mean.data_ptr(),
        rstd.data_ptr(),
        d_x.data_ptr(),
        address(d_residual) if with_residual else 0,
        d_weight.data_ptr(),
        d_bias.data_ptr(),
        rows,
        columns,
        dtype_code(x_dtype),
        dtype_code(total.dtype),
        rms,
        *dropout_arguments(seed, p),
    )
    return d_x, d_residual, d_weight, d_bias


def _backward_fake(
    d_norm: Tensor | None,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_is_bf16: bool,
    with_residual: bool,
    rms: bool,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x = total.new_empty(total.shape, dtype=torch.bfloat16 if x_is_bf16 else torch.float32)
    d_residual = total.new_empty(total.shape if with_residual else (0,))
    if not with_residual:
        d_residual = d_residual.float()
    d_weight = total.new_empty(total.shape[-1], dtype=torch.float32)
    return d_x, d_residual, d_weight, torch.empty_like(d_weight)


_add_norm = differentiable(
    "add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, float eps, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
_add_norm_backward = register(
    "add_norm_backward(Tensor? d_norm, Tensor? d_total, Tensor total, Tensor? weight, Tensor mean, "
    "Tensor rstd, bool x_is_bf16, bool with_residual, bool rms, float dropout_p, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
