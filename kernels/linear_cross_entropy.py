"""linear_cross_entropy on the GPU: the logits of a tile at a time, twice.

The forward pass keeps the log-sum-exp of each row; the backward pass computes the logits again, a
chunk of classes after the other, and turns them into their gradient where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.reference import linear_cross_entropy as definition

from .linear_cross_entropy_backward import gradients
from .linear_cross_entropy_forward import Loss, empty_losses, losses
from .product import flat
from .runtime import DEVICES, refusal


def unsupported(
    *, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, **_: object
) -> str | None:
    """Needs CUDA tensors in bf16, fp16 or fp32, and at least one class."""
    if weight.shape[0] == 0:
        return "needs at least one class, got 0"
    return refusal(hidden, weight, target, bias)


def forward(
    *,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """See llmos_fast.ops.linear_cross_entropy."""
    loss, _, _ = _linear_cross_entropy(
        flat(hidden), weight.to(hidden.dtype), target.reshape(-1), bias,
        ignore_index, label_smoothing, z_loss, softcap, reduction,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss  # type: ignore[no-any-return]


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = Loss(ignore_index, label_smoothing, z_loss, softcap)
    return losses(hidden, weight, target, bias, loss, reduction)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_losses(hidden, reduction)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ignore_index, label_smoothing, z_loss, softcap, ctx.reduction = inputs
    ctx.loss = Loss(ignore_index, label_smoothing, z_loss, softcap)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_loss: Tensor, _lse: Any, _count: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias, lse, count = ctx.saved_tensors
    need = [n for i, n in enumerate(ctx.needs_input_grad[:4]) if i != 2]
    if torch.is_grad_enabled():
        tensors = {"hidden": hidden, "weight": weight, "bias": bias}
        rest = {"target": target, "reduction": ctx.reduction, **ctx.loss._asdict()}
        found = list(second_order(definition, tensors, rest, (d_loss,)).values())
    else:
        count = count if ctx.reduction == "mean" else None
        found = _linear_cross_entropy_backward(
            d_loss, hidden, weight, target, bias, lse, count, *ctx.loss, need
        )
    d_hidden, d_weight, d_bias = (g if n else None for g, n in zip(found, need, strict=True))
    return (d_hidden, d_weight, None, d_bias, *(None,) * 5)


def _backward_kernel(
    d_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    loss = Loss(ignore_index, label_smoothing, z_loss, softcap)
    return gradients(d_losses, hidden, weight, target, bias, lse, count, loss, need)


def _backward_fake(
    d_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    count: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    need: list[bool],
) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(s if n else (0,)) for s, n in zip(shapes, need, strict=True))


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"

_linear_cross_entropy = differentiable(
    "linear_cross_entropy_triton(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
    f"{_OPTIONS}, str reduction) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
_linear_cross_entropy_backward = register(
    "linear_cross_entropy_triton_backward(Tensor d_losses, Tensor hidden, Tensor weight, "
    f"Tensor target, Tensor? bias, Tensor lse, Tensor? count, {_OPTIONS}, bool[] need) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
    DEVICES,
)
