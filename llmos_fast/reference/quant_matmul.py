"""Definition of the quantized linear op: y = activation(round(x) W^T + bias)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmos_fast.quantize import PANEL, QuantizedWeight, rounds_activations
from llmos_fast.reference.precision import upcast


def round_to_int8(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Integers -127..127 in fp32 like ``x``, and the scales that they are to be multiplied with.

    For each group of the last dimension: scale = amax / 127 and q = round_half_even(x * (127 /
    amax)), where amax is its largest magnitude and at least 1e-30. A group that is not finite
    becomes NaN.
    """
    k = x.shape[-1]
    grouped = F.pad(x.float(), (0, -k % group_size)).unflatten(-1, (-1, group_size))
    amax = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    # 127 / amax would be amax.reciprocal() * 127: another rounding, and one x in a million moves
    inverse = torch.full_like(amax, 127.0) / amax
    integers = torch.round(grouped * inverse).flatten(-2)[..., :k]
    return integers, (amax / 127).expand_as(grouped).flatten(-2)[..., :k]


def apply_activation(y: Tensor, activation: str | None) -> Tensor:
    """One of the element-wise functions by name; None is the identity."""
    if activation is None:
        return y
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "relu2":
        return F.relu(y).square()
    function: Tensor = getattr(F, activation)(y)
    return function


def quant_matmul(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As ``llmos_fast.ops.quant_matmul``; the gradient passes through the rounding of x."""
    wide = upcast(x)
    if rounds_activations(qweight.scheme):
        integers, scale = round_to_int8(x.detach(), qweight.group_size)
        # adds exactly zero, and carries the gradient
        wide = integers.to(wide.dtype) * scale.to(wide.dtype) + (wide - wide.detach())
    y = F.linear(wide, qweight.dequantize(wide.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return finish(y, activation, gated, residual).to(x.dtype)


def finish(y: Tensor, activation: str | None, gated: bool, residual: Tensor | None) -> Tensor:
    """What follows the product and its bias."""
    if gated:
        gate, up = y.unflatten(-1, (-1, 2, PANEL)).unbind(-2)
        y = (apply_activation(gate, activation) * up).flatten(-2)
    else:
        y = apply_activation(y, activation)
    return y if residual is None else y + residual.to(y.dtype)


def unsupported(**call: object) -> None:
    """The definition takes every valid call."""


forward = quant_matmul
