"""quant_matmul on the GPU for weights in panels: int8, int4, int4_asym and nf4, as an operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from llmos_fast.formats import FOUR_BIT
from llmos_fast.library import differentiable, register
from llmos_fast.quantize import PANEL, QuantizedWeight, format_of, rounds_activations
from llmos_fast.reference import quant_matmul as definition
from llmos_fast.reference.quant_matmul import finish

from . import quant_matmul_self_test as self_test
from .epilogue import Epilogue
from .matrix import all_fit_tma, matrix
from .panel_product import panel_product
from .panel_weight import panel_weight
from .panels import panels
from .product import flat, needs_gradients
from .round_rows import round_rows
from .runtime import DEVICES, contiguous, refusal

# rows beyond which a dense weight, made once, saves more time than it costs
MAX_ROWS = 512
# up to which the self-test stands for a call: launches of the tables, and the dense weight
TESTED_ROWS = (16, 32, 64, MAX_ROWS, 2 * MAX_ROWS)
# 127 * 128 * 131072 is the largest sum of products that int32 holds
MAX_INTEGER_K = 131072


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    panel_weight(panels(packed, scales, zero_points, scheme, group_size, gated=False), out)
    return out


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


dequantize = register(
    "dequantize_triton(Tensor packed, Tensor scales, Tensor? zero_points, str scheme, "
    "int group_size, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
    DEVICES,
)


def product(
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
    """The contract of ``ops.quant_matmul``, for the parts of a weight."""
    rows, columns = flat(x), n // 2 if gated else n
    if rows.shape[0] > MAX_ROWS and not rounds_activations(scheme):
        weight = _dequantize(
            packed, scales, zero_points, scheme, group_size, n, rows.shape[1], x.dtype
        )
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return finish(y, activation or None, gated, residual)
    out = x.new_empty(rows.shape[0], columns)
    if rounds_activations(scheme):
        left, left_scales = round_rows(rows, group_size)
    else:
        left, left_scales = aligned_rows(rows), None
    epilogue = Epilogue(
        *biases(bias, gated),
        residual=None if residual is None else matrix(flat(residual)),
    )
    weight_ = panels(packed, scales, zero_points, scheme, group_size, gated)
    panel_product(left, left_scales, weight_, epilogue, out, activation)
    return out.view(*x.shape[:-1], columns)


def aligned_rows(x: Tensor) -> Tensor:
    """``x`` [m k], where its rows do not begin at 16 bytes a copy with zeros after k."""
    k = x.shape[1]
    if k % 16 == 0 and x.stride(0) % 16 == 0 and all_fit_tma(x):
        return x
    filled = x.new_zeros(x.shape[0], triton.cdiv(k, 16) * 16)
    filled[:, :k] = x
    return filled


def biases(bias: Tensor | None, gated: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of the product, and of the one that lies in turn with it."""
    if bias is None or not gated:
        return contiguous(bias), None
    both = bias.view(-1, 2, PANEL).transpose(0, 1).reshape(2, -1)
    return both[0], both[1]


def _tested_product(
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
    # unsupported() has asked, but not where torch.compile traced it with fake tensors
    if _refusal(x, scheme, group_size, gated) is None:
        rest = (scheme, group_size, n, activation, gated)
        return product(x, packed, scales, zero_points, bias, residual, *rest)
    weight = QuantizedWeight(packed, scales, zero_points, scheme, group_size, (n, x.shape[-1]))
    return definition.quant_matmul(
        x, weight, bias, activation=activation or None, gated=gated, residual=residual
    )


def _refusal(x: Tensor, scheme: str, group_size: int, gated: bool) -> str | None:
    rows = x.shape[:-1].numel()
    tested = next((r for r in TESTED_ROWS if rows <= r), TESTED_ROWS[-1])
    group = group_size if format_of(scheme) in FOUR_BIT else 0
    case = self_test.Case(scheme, group, x.dtype, tested, gated)
    return self_test.refusal(case, product, _dequantize, x.device)


def _fake(
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


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.fused:  # forward() fuses nothing nonlinear where gradients are wanted
        raise RuntimeError("llmos_fast::quant_matmul_triton: no gradient through an activation")
    packed, scales, zero_points = ctx.saved_tensors
    x_gradient = bias_gradient = None
    if ctx.needs_input_grad[0]:
        shape = (ctx.n, ctx.columns, gradient.dtype)
        weight = dequantize(packed, scales, zero_points, ctx.scheme, ctx.group_size, *shape)
        x_gradient = gradient @ weight
    if ctx.needs_input_grad[4]:
        bias_gradient = flat(gradient).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    residual_gradient = gradient if ctx.needs_input_grad[5] else None
    return x_gradient, None, None, None, bias_gradient, residual_gradient, *[None] * 5


_operator = differentiable(
    "quant_matmul_triton(Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, "
    "Tensor? bias, Tensor? residual, str scheme, int group_size, SymInt n, str activation, "
    "bool gated) -> Tensor",
    _tested_product,
    _fake,
    _setup_context,
    _backward,
    DEVICES,
)


def unsupported(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    gated: bool,
    residual: Tensor | None,
) -> str | None:
    """None, or what the kernels need and what they got."""
    if (reason := refusal(x, bias, residual)) is not None:
        return reason
    if qweight.scheme == "int8" and x.shape[-1] > MAX_INTEGER_K:
        return f"sums in int32: it needs K <= {MAX_INTEGER_K}, got {x.shape[-1]}"
    if torch.compiler.is_compiling():
        return None
    return _refusal(x, qweight.scheme, qweight.group_size, gated)


def forward(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.quant_matmul."""
    w = qweight
    inputs = (x, w.packed, w.scales, w.zero_points, bias)
    rest = (w.scheme, w.group_size, w.shape[0])
    y: Tensor
    if (activation or gated) and needs_gradients((x, bias, residual)):
        y = _operator(*inputs, None, *rest, "", False)
        return finish(y, activation or None, gated, residual)
    y = _operator(*inputs, residual, *rest, activation, gated)
    return y
