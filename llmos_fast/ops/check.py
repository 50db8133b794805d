"""What the validations of all ops share: one wording, and autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def require(condition: bool, op: str, argument: str, rule: str, value: object) -> None:
    """Raise the project's ValueError, which names op, argument, rule and value, unless true."""
    if not condition:
        raise ValueError(f"{op}: {argument} must {rule}, got {value}")


def floating(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor is floating point and on the device of the first one."""
    device = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            require(False, op, argument, "be a tensor", type(tensor).__name__)
        if not tensor.is_floating_point():
            require(False, op, argument, "be floating point", tensor.dtype)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            require(False, op, argument, f"be on {device}, as the first tensor is", tensor.device)


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor has the dtype of the first one."""
    first, dtype = "", None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if dtype is None:
            first, dtype = argument, tensor.dtype
        elif tensor.dtype != dtype:
            require(False, op, argument, f"have the dtype of {first}, {dtype}", tensor.dtype)


def weight_dtype(op: str, x: Tensor, **weights: Tensor) -> None:
    """Every weight has the dtype of ``x``, or is fp32 beside 16 bits."""
    for argument, weight in weights.items():
        mixed = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
        if weight.dtype != x.dtype and not mixed:
            rule = f"have the dtype of the input, {x.dtype}, or float32 beside 16 bits"
            require(False, op, argument, rule, weight.dtype)


def shape(
    op: str, argument: str, tensor: Tensor | None, expected: tuple[int, ...], names: str
) -> None:
    """``tensor`` has exactly the ``expected`` sizes, called ``names`` in the message."""
    if tensor is not None and tensor.shape != expected:
        rule = f"have shape ({names}) = {tuple(expected)}"
        require(False, op, argument, rule, tuple(tensor.shape))


def probability(op: str, argument: str, value: float) -> None:
    """``value`` is a probability."""
    require(0.0 <= value <= 1.0, op, argument, "be in [0, 1]", value)


def rows_exist(op: str, argument: str, rows: Tensor, end: int, table: str) -> None:
    """``rows`` are in [0, end), the rows of ``table``; unseen where a device must be awaited."""
    if not rows.is_cpu or rows.numel() == 0 or torch.compiler.is_compiling():
        return
    wrong = rows[(rows < 0) | (rows >= end)]
    if wrong.numel():
        rule = f"be in [0, {end}), the rows of {table}"
        require(False, op, argument, rule, wrong[0].item())


def no_gradient(op: str, instead: str, **tensors: Tensor | None) -> None:
    """Where grad mode is on, no tensor requires gradients; ``instead`` says what to do."""
    if not torch.is_grad_enabled():
        return
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            rule = f"not require gradients, which this op has not ({instead})"
            require(False, op, argument, rule, "requires_grad=True")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, fp32 and 16-bit tensors in its dtype, as torch's own products do."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.dtype not in (dtype, torch.float64) else t
        for t in tensors
    )


def autocast_weights(*weights: Tensor) -> tuple[Tensor, ...]:
    """As ``autocast``, but fp32 stays: implementations read it, and give fp32 gradients."""
    if not torch._C._is_any_autocast_enabled():
        return weights
    return tuple(w if w.dtype == torch.float32 else autocast(w)[0] for w in weights)  # type: ignore[misc]
