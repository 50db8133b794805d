"""quant_matmul on the GPU for weights in panels: int8, int4, int4_asym and nf4, as an operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from llmos_fast.formats import FOUR_BIT
from llmos_fast.quant_operator import by_definition, dequantize_operator, product_operator
from llmos_fast.quantize import PANEL, QuantizedWeight, format_of, rounds_activations
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


dequantize = dequantize_operator("dequantize_triton", _dequantize, DEVICES)


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
    run = product if _refusal(x, scheme, group_size, gated) is None else by_definition
    rest = (scheme, group_size, n, activation, gated)
    return run(x, packed, scales, zero_points, bias, residual, *rest)


def _refusal(x: Tensor, scheme: str, group_size: int, gated: bool) -> str | None:
    rows = x.shape[:-1].numel()
    tested = next((r for r in TESTED_ROWS if rows <= r), TESTED_ROWS[-1])
    group = group_size if format_of(scheme) in FOUR_BIT else 0
    case = self_test.Case(scheme, group, x.dtype, tested, gated)
    return self_test.refusal(case, product, _dequantize, x.device)


_operator = product_operator("quant_matmul_triton", _tested_product, dequantize, DEVICES)


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
