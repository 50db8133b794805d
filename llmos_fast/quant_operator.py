"""quant_matmul and dequantize as operators of torch, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register
from llmos_fast.quantize import QuantizedWeight
from llmos_fast.reference import quant_matmul as definition

Function = Callable[..., Any]


def by_definition(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scheme: str,
    group_size: int,
    n: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """The definition of quant_matmul, with the arguments of ``product_operator``."""
    weight = QuantizedWeight(packed, scales, zero_points, scheme, group_size, (n, x.shape[-1]))
    return definition.quant_matmul(
        x, weight, bias, activation=activation or None, gated=gated, residual=residual
    )


def dequantize_operator(name: str, kernel: Function, devices: tuple[str, ...]) -> Function:
    """``name(packed, scales, zero_points, scheme, group_size, rows, columns, dtype)``."""
    return register(
        f"{name}(Tensor packed, Tensor scales, Tensor? zero_points, str scheme, int group_size, "
        "SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
        kernel,
        _dequantize_fake,
        devices,
    )


def product_operator(
    name: str, kernel: Function, dequantize: Function, devices: tuple[str, ...]
) -> Function:
    """quant_matmul by the parts of a weight, with gradients to x, bias and residual.

    A fused activation or gate has none. ``dequantize``, for the gradient of x, is that of
    ``dequantize_operator``.
    """

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fused:  # whoever wants gradients fuses nothing nonlinear
            raise RuntimeError(f"llmos_fast::{name}: no gradient through a fused activation")
        packed, scales, zero_points = ctx.saved_tensors
        x_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            shape = (ctx.n, ctx.columns, gradient.dtype)
            weight = dequantize(packed, scales, zero_points, ctx.scheme, ctx.group_size, *shape)
            x_gradient = gradient @ weight
        if ctx.needs_input_grad[4]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            bias_gradient = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        residual_gradient = gradient if ctx.needs_input_grad[5] else None
        return x_gradient, None, None, None, bias_gradient, residual_gradient, *[None] * 5

    return differentiable(
        f"{name}(Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, Tensor? bias, "
        "Tensor? residual, str scheme, int group_size, SymInt n, str activation, bool gated) "
        "-> Tensor",
        kernel,
        _product_fake,
        _setup_context,
        backward,
        devices,
    )


def _dequantize_fake(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype, device=packed.device)


def _product_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    scheme: str,
    group_size: int,
    n: int,
    activation: str,
    gated: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n // 2 if gated else n))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zero_points, bias, _, scheme, group_size, n, activation, gated = inputs
    ctx.save_for_backward(packed, scales, zero_points)
    ctx.scheme, ctx.group_size, ctx.n, ctx.columns = scheme, group_size, n, x.shape[-1]
    ctx.fused = bool(activation) or gated
    ctx.bias_dtype = None if bias is None else bias.dtype
