"""Dropout with a residual on the CPU: the first half of csrc/cpu/add_norm.inl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable
from llmos_fast.native.add_norm import unsupported as add_norm_unsupported
from llmos_fast.native.common import _C, address, contiguous, dropout_arguments, dtype_code


def unsupported(*, x: Tensor, residual: Tensor | None, **_: object) -> str | None:
    """As for add_norm."""
    return add_norm_unsupported(x=x, residual=residual)


def forward(*, x: Tensor, residual: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """See llmos_fast.ops.dropout."""
    if seed is None:
        return x if residual is None else residual + x
    return _dropout(x, residual, dropout_p, seed)  # type: ignore[no-any-return]


def _forward_cpu(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    x = x.contiguous()
    residual = contiguous(residual)
    total = torch.empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    _C.add_norm_forward(
        x.data_ptr(),
        address(residual),
        0,
        0,
        0,
        total.data_ptr(),
        0,
        0,
        rows,
        columns,
        1,
        rows,
        0,
        0,
        columns,
        dtype_code(x.dtype),
        dtype_code(total.dtype),
        0,
        0,
        False,
        0.0,
        *dropout_arguments(seed, p),
    )
    return total


def _forward_fake(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, ctx.p, seed = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(seed)


def _backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    (seed,) = ctx.saved_tensors
    need_x, need_residual = ctx.needs_input_grad[:2]
    # the gradient of x is dropped by the same bits: the op serves as its own gradient
    d_x = _dropout(d_total, None, ctx.p, seed).to(ctx.x_dtype) if need_x else None
    return d_x, d_total if need_residual else None, None, None


_dropout = differentiable(
    "dropout(Tensor x, Tensor? residual, float dropout_p, Tensor seed) -> Tensor",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
