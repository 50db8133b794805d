"""quant_matmul on the GPU: weights in panels by quant_matmul_panels.py, fp8 weights here.

"fp8" and "fp8_block" multiply in fp8 (fp8_matmul.py). "fp8_a16" is widened in registers; its scales
belong to whole rows of the weight, so they multiply columns of the fp32 result, in the epilogue.
fp8 is for inference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.formats import FP8_BLOCK
from llmos_fast.library import register
from llmos_fast.quantize import FP8, QuantizedWeight, format_of
from llmos_fast.reference import quant_matmul as definition

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
    return fp8_self_test.refusal(x.device, qweight.scheme == "fp8_block", x.dtype)


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
    rest = (bias, None if residual is None else flat(residual))
    if qweight.scheme == "fp8_a16":
        scales = qweight.scales.view(-1)
        out = _fp8_product(flat(x), qweight.packed, scales, *rest, activation or "")
    else:
        blocks = qweight.scheme == "fp8_block"
        out = _fp8_matmul(flat(x), qweight.packed, qweight.scales, *rest, blocks, activation or "")
    return out.view(*x.shape[:-1], qweight.shape[0])  # type: ignore[no-any-return]


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
) -> Tensor:
    # unsupported() has asked, but not where torch.compile traced it with fake tensors
    if fp8_self_test.refusal(x.device, blocks, x.dtype) is None:
        return fp8_matmul(x, packed, scales, bias, residual, blocks, activation)
    n, k = packed.shape
    scheme, group_size = ("fp8_block", FP8_BLOCK) if blocks else ("fp8", k)
    weight = QuantizedWeight(packed, scales, None, scheme, group_size, (n, k))
    return definition.quant_matmul(
        x, weight, bias, activation=activation or None, residual=residual
    )


def _fake(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


_fp8_product = register(
    "fp8_product_triton(Tensor x, Tensor packed, Tensor scales, Tensor? bias, Tensor? residual, "
    "str activation) -> Tensor",
    fp8_product,
    _fake,
    DEVICES,
)
_fp8_matmul = register(
    "fp8_matmul_triton(Tensor x, Tensor packed, Tensor scales, Tensor? bias, Tensor? residual, "
    "bool blocks, str activation) -> Tensor",
    _tested_matmul,
    _fake,
    DEVICES,
)
