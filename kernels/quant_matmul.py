"""quant_matmul on the GPU: weights in panels by quant_matmul_panels.py, fp8 weights here.

"fp8" and "fp8_block" multiply in fp8 (fp8_matmul.py). "fp8_a16" is widened in registers; its scales
belong to whole rows of the weight, so they multiply columns of the fp32 result, in the epilogue; a
gated pair is one product, and torch gates it. fp8 is for inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.formats import FP8_BLOCK
from llmos_fast.library import register
from llmos_fast.quant_operator import by_definition
from llmos_fast.quantize import FP8, QuantizedWeight, format_of, rows_in_turn
from llmos_fast.reference.quant_matmul import finish

from . import fp8_self_test
from . import quant_matmul_panels as in_panels
from .epilogue import Epilogue
from .fp8_matmul import fp8_matmul
from .matrix import optional_matrix
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
    """None, or a sentence; fp8 needs tensors without gradient, and a GPU that knows it."""
    if format_of(qweight.scheme) not in FP8:
        return in_panels.unsupported(x, qweight, bias, gated, residual)
    if qweight.scheme == "fp8_block_a16":
        return "widens fp8 with scales of rows, got fp8_block_a16"
    if (reason := refusal(x, bias, residual)) is not None:
        return reason
    if needs_gradients((x, bias, residual)):
        return "computes no gradients, got tensors with requires_grad"
    if not INTERPRETED and architecture(x.device) < 90:
        capability = torch.cuda.get_device_capability(x.device)
        return f"needs compute capability 9.0 or more for fp8, got {capability}"
    if qweight.scheme == "fp8_a16":
        return None
    return fp8_self_test.refusal(x.device, qweight.scheme == "fp8_block", x.dtype, gated)


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
    if format_of(qweight.scheme) not in FP8:
        return in_panels.forward(x, qweight, bias, activation or "", gated, residual)
    n, rows = qweight.shape[0], flat(x)
    plane = None if residual is None else flat(residual)
    if qweight.scheme == "fp8_a16":
        parts = (qweight.packed, qweight.scales.view(-1), bias)
        if gated:
            y = _fp8_product(rows, *parts, None, "")
            out = finish(y, activation, gated, plane, rows_in_turn(qweight.scheme, n // 2))
        else:
            out = _fp8_product(rows, *parts, plane, activation or "")
    else:
        parts = (qweight.packed, qweight.scales, bias)
        how = (qweight.scheme == "fp8_block", activation or "", gated)
        out = _fp8_matmul(rows, *parts, plane, *how)
    return out.view(*x.shape[:-1], n // 2 if gated else n)


def fp8_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """activation(x [m k] (packed [n k] scales [n])^T + bias) + residual, e4m3 in bytes."""
    weight = packed.view(torch.float8_e4m3fn)
    plane = optional_matrix(residual)
    epilogue = Epilogue(contiguous(bias), residual=plane, scales=scales.contiguous())
    return product(x, weight, epilogue, activation=activation)


def _tested_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    blocks: bool,
    activation: str,
    gated: bool,
) -> Tensor:
    # unsupported() has asked, but not where torch.compile traced it with fake tensors
    if fp8_self_test.refusal(x.device, blocks, x.dtype, gated) is None:
        return fp8_matmul(x, packed, scales, bias, residual, blocks, activation, gated)
    n, k = packed.shape
    scheme, group_size = ("fp8_block", FP8_BLOCK) if blocks else ("fp8", k)
    rest = (scheme, group_size, n, activation, gated)
    return by_definition(x, packed, scales, None, bias, residual, *rest)


def _fake(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _matmul_fake(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    *_, gated = rest
    return x.new_empty(x.shape[0], packed.shape[0] // 2 if gated else packed.shape[0])


_fp8_product = register(
    "fp8_product_triton(Tensor x, Tensor packed, Tensor scales, Tensor? bias, Tensor? residual, "
    "str activation) -> Tensor",
    fp8_product,
    _fake,
    DEVICES,
)
_fp8_matmul = register(
    "fp8_matmul_triton(Tensor x, Tensor packed, Tensor scales, Tensor? bias, Tensor? residual, "
    "bool blocks, str activation, bool gated) -> Tensor",
    _tested_matmul,
    _matmul_fake,
    DEVICES,
)
