"""quant_matmul on the GPU for fp8 weights: read as bytes, widened in registers, scaled at the end.

Inference only. A scale belongs to a whole row of the weight, so it multiplies a column of the fp32
result, in the epilogue that adds the bias and activates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.library import register
from llmos_fast.quantize import QuantizedWeight

from .epilogue import Epilogue
from .product import flat, needs_gradients, product
from .runtime import DEVICES, INTERPRETED, architecture, contiguous, refusal


def unsupported(
    *,
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> str | None:
    """Needs an fp8 weight, tensors without gradient, and a GPU that knows fp8."""
    if qweight.scheme != "fp8_a16":
        return f"takes fp8_a16, got {qweight.scheme}"
    if residual is not None:
        return "adds no residual, got one"
    if (reason := refusal(x, bias)) is not None:
        return reason
    if needs_gradients((x, bias)):
        return "computes no gradients, got tensors with requires_grad"
    if not INTERPRETED and architecture(x.device) < 90:
        return "needs compute capability 9.0 for fp8"
    return None


def forward(
    *,
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.quant_matmul."""
    rows = flat(x)
    out = _fp8_product(rows, qweight.packed, qweight.scales.view(-1), bias, activation or "")
    return out.view(*x.shape[:-1], qweight.shape[0])  # type: ignore[no-any-return]


def fp8_product(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """activation(x [m k] (packed [n k] scales [n])^T + bias), e4m3 in bytes."""
    weight = packed.view(torch.float8_e4m3fn)
    epilogue = Epilogue(contiguous(bias), scales=scales.contiguous())
    return product(x, weight, epilogue, activation=activation)


def _fake(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


_fp8_product = register(
    "fp8_product_triton(Tensor x, Tensor packed, Tensor scales, Tensor? bias, str activation) "
    "-> Tensor",
    fp8_product,
    _fake,
    DEVICES,
)
