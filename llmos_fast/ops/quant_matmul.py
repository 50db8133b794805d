"""Contract of the quantized linear op."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast import dispatch
from llmos_fast.quantize import FOUR_BIT, GROUP_SIZES, QuantizedWeight, format_of

ACTIVATIONS = (None, "relu", "relu2", "gelu", "gelu_tanh", "silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

dispatch.implementations("quant_matmul", "native", "triton")


def quant_matmul(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """activation(x W^T + bias) with a weight from ``llmos_fast.quantize``.

    x: Float[... in_features], fp32, bf16, fp16 or fp64, any strides
    qweight: QuantizedWeight of shape (out_features, in_features), on x's device
    bias: Float[out_features], x's dtype or fp32
    activation: None, "relu", "relu2" (squared), "gelu", "gelu_tanh" or "silu"
    returns: Float[... out_features] in x's dtype; sums are fp32 (fp64 for fp64), rounded once

    Schemes without "_a16" first round x to int8, each row by its own scale: in fp32,
    ``q = round_half_even(x * (127 / amax))``, standing for ``q * (amax / 127)``. Integer products
    are exact. A row of x that is not finite gives NaN there. An empty x gives an empty result.

    Gradients go to x and to bias, never to the weight: dX = dY W, straight through the rounding
    of x (so an adapter beside a frozen quantized layer trains as in QLoRA, arXiv 2305.14314).

    Raises ValueError for dtypes, devices, shapes and values that break these rules.
    """
    _check_weight(qweight)
    n, k = qweight.shape
    if x.dtype not in DTYPES:
        raise _error("x", "must be float32, bfloat16, float16 or float64", x.dtype)
    if x.ndim == 0 or x.shape[-1] != k:
        raise _error("x", f"must have {k} (in_features) as its last size", tuple(x.shape))
    if x.device != qweight.device:
        raise _error("x", f"must be on qweight's device {qweight.device}", x.device)
    if bias is not None:
        if bias.shape != (n,):
            raise _error("bias", f"must have shape ({n},)", tuple(bias.shape))
        if bias.dtype not in (x.dtype, torch.float32):
            raise _error("bias", f"must be {x.dtype} or torch.float32", bias.dtype)
        if bias.device != x.device:
            raise _error("bias", f"must be on x's device {x.device}", bias.device)
    if activation not in ACTIVATIONS:
        known = ", ".join(str(name) for name in ACTIVATIONS)
        raise _error("activation", f"must be one of {known}", repr(activation))
    result: Tensor = dispatch.select(
        "quant_matmul", impl, x=x, qweight=qweight, bias=bias, activation=activation
    )
    return result


def _error(argument: str, rule: str, value: object) -> ValueError:
    return ValueError(f"quant_matmul: {argument} {rule}, got {value}")


def _check_weight(weight: QuantizedWeight) -> None:
    """Shapes, dtypes and devices of the parts; their values are checked where they are made."""
    if not isinstance(weight, QuantizedWeight):
        raise _error("qweight", "must be a QuantizedWeight", type(weight).__name__)
    name = format_of(weight.scheme)
    n, k = weight.shape
    four_bit = name in FOUR_BIT
    if weight.group_size not in (GROUP_SIZES if four_bit else (k,)):
        sizes = "32, 64 or 128" if four_bit else f"{k} (whole rows)"
        raise _error("qweight.group_size", f"must be {sizes} for {name}", weight.group_size)
    groups = (n, -(-k // weight.group_size))
    packed_shape = (n, (k + 1) // 2) if four_bit else (n, k)
    packed_dtype = torch.int8 if name == "int8" else torch.uint8
    _check_part("packed", weight.packed, packed_shape, packed_dtype, weight.device)
    _check_part("scales", weight.scales, groups, torch.float32, weight.device)
    if (weight.zero_points is None) != (name != "int4_asym"):
        got = "none" if weight.zero_points is None else "a tensor"
        raise _error("qweight.zero_points", "must be given for int4_asym, and only for it", got)
    if weight.zero_points is not None:
        _check_part("zero_points", weight.zero_points, groups, torch.uint8, weight.device)


def _check_part(
    name: str, part: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    if part.shape != shape or part.dtype != dtype or part.device != device:
        got = f"{part.dtype} {tuple(part.shape)} on {part.device}"
        raise _error(f"qweight.{name}", f"must be {dtype} {shape} on {device}", got)
