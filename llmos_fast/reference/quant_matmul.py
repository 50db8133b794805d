"""Definition of the quantized linear op: y = activation(round(x) W^T + bias)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmos_fast.formats import FP8, FP8_MAX
from llmos_fast.quantize import PANEL, QuantizedWeight, rounds_activations, rows_in_turn
from llmos_fast.reference.precision import upcast


def round_activations(x: Tensor, scheme: str, group_size: int) -> tuple[Tensor, Tensor]:
    """Levels q in fp32 like ``x``, and the scales that they are to be multiplied with.

    For each group of the last dimension: scale = amax / most and q = round_half_even(x * (most /
    amax)), where amax is its largest magnitude and at least 1e-30. int8: most is 127, and q an
    integer; fp8: most is 448, and q a number of e4m3. A group that is not finite becomes NaN.
    """
    k, fp8 = x.shape[-1], scheme in FP8
    most = FP8_MAX if fp8 else 127.0
    grouped = F.pad(x.float(), (0, -k % group_size)).unflatten(-1, (-1, group_size))
    amax = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    # most / amax would be amax.reciprocal() * most: another rounding, and one x in a million moves
    scaled = grouped * (torch.full_like(amax, most) / amax)
    levels = scaled.to(torch.float8_e4m3fn).float() if fp8 else torch.round(scaled)
    return levels.flatten(-2)[..., :k], (amax / most).expand_as(grouped).flatten(-2)[..., :k]


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
        levels, scale = round_activations(x.detach(), qweight.scheme, qweight.group_size)
        # adds exactly zero, and carries the gradient
        wide = levels.to(wide.dtype) * scale.to(wide.dtype) + (wide - wide.detach())
    y = F.linear(wide, qweight.dequantize(wide.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    turn = rows_in_turn(qweight.scheme, qweight.shape[0] // 2)
    return finish(y, activation, gated, residual, turn).to(x.dtype)


def finish(
    y: Tensor,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
    turn: int = PANEL,
) -> Tensor:
    """What follows the product and its bias; where gated, ``turn`` columns of each in turn."""
    if gated:
        gate, up = y.unflatten(-1, (-1, 2, turn)).unbind(-2)
        y = (apply_activation(gate, activation) * up).flatten(-2)
    else:
        y = apply_activation(y, activation)
    return y if residual is None else y + residual.to(y.dtype)


def unsupported(**call: object) -> None:
    """The definition takes every valid call."""


forward = quant_matmul
