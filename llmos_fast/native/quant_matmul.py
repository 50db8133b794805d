"""quant_matmul on csrc: C++ SIMD on CPUs, and CUDA kernels (quant_matmul_cuda.py) on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

import llmos_fast._C as _C
from llmos_fast.library import is_plain, refusal_of_transforms
from llmos_fast.native import quant_matmul_cuda as cuda
from llmos_fast.native import quant_matmul_self_test as self_test
from llmos_fast.native.common import FORMAT_CODES, address, contiguous, dtype_code
from llmos_fast.quant_operator import by_definition, dequantize_operator, product_operator
from llmos_fast.quantize import (
    FP8,
    SCHEMES,
    QuantizedWeight,
    format_of,
    rounds_activations,
    rows_in_turn,
)
from llmos_fast.reference.quant_matmul import finish

# 127 * 128 * 131072 is the largest sum of products that int32 holds
_MAX_INTEGER_K = 131072
_DEVICES = ("CPU", "CUDA")

_ROUNDS = {scheme: rounds_activations(scheme) for scheme in SCHEMES}


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
    if packed.is_cuda:
        rest = (scheme, group_size, rows, columns, dtype)
        return cuda.dequantize(packed, scales, zero_points, *rest)
    # the tensors are named until the kernel returns: an address alone keeps none of them alive
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    shape = (rows, columns, group_size, FORMAT_CODES[scheme])
    parts = (packed.contiguous(), scales.contiguous(), contiguous(zero_points))
    addresses = [address(part) for part in parts]
    target = out if dtype in (torch.bfloat16, torch.float32) else out.float()
    every_row = (0, False, rows)
    _C.quant_rows(*addresses, *every_row, target.data_ptr(), *shape, dtype_code(target.dtype))
    return target.to(dtype)


dequantize = dequantize_operator("dequantize", _dequantize, _DEVICES)


def _quant_matmul(
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
    rest = (scheme, group_size, n, activation, gated)
    if x.is_cuda:
        # unsupported() has asked, but not where torch.compile traced it with fake tensors
        if self_test.refusal(x.device, scheme, x.dtype) is None:
            return cuda.product(x, packed, scales, zero_points, bias, residual, *rest)
        return by_definition(x, packed, scales, zero_points, bias, residual, *rest)
    packed, scales, zero_points = packed.contiguous(), scales.contiguous(), contiguous(zero_points)
    return _on_cpu(x, packed, scales, zero_points, bias, residual, *rest)


def _on_cpu(
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
    """As ``_quant_matmul``, for contiguous parts of a weight."""
    *leading, k = x.shape
    if len(leading) == 1 and x.stride(1) == 1:
        m, stride = leading[0], x.stride(0)
    else:
        x, stride = x.contiguous(), k
        m = x.numel() // k
    if bias is not None:
        bias = bias.float().contiguous()
    if residual is not None:
        residual = residual.contiguous()
    code, rounds = FORMAT_CODES[scheme], _ROUNDS[scheme]
    out = x.new_empty((*leading, n // 2 if gated else n))
    if m:
        _C.quant_matmul(
            x.data_ptr(),
            stride,
            packed.data_ptr(),
            scales.data_ptr(),
            address(zero_points),
            address(bias),
            address(residual),
            out.data_ptr(),
            m,
            n,
            k,
            group_size,
            code,
            cuda.ACTIVATION_CODES[activation],
            rounds,
            x.dtype == torch.bfloat16,
            gated,
        )
    return out


_operator = product_operator("quant_matmul", _quant_matmul, dequantize, _DEVICES)


def unsupported(
    *,
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> str | None:
    """None, or what the kernels need and what they got."""
    if (reason := refusal_of_transforms()) is not None:
        return reason
    if x.dtype == torch.float64:
        return "computes in fp32: it needs float32, bfloat16 or float16, got float64"
    if qweight.scheme == "int8" and x.shape[-1] > _MAX_INTEGER_K:
        return f"sums in int32: it needs K <= {_MAX_INTEGER_K}, got {x.shape[-1]}"
    if x.is_cpu:
        if qweight.scheme not in FORMAT_CODES:
            return f"reads scales of rows and their groups on CPUs, got {qweight.scheme}"
        return None
    if x.device.type != "cuda":
        return f"needs a CPU or CUDA tensor, got {x.device.type}"
    if not cuda.is_built():
        return "needs the CUDA extension, which was not built (no nvcc at install time)"
    if format_of(qweight.scheme) in FP8:
        return f"takes int8, int4, int4_asym and nf4 on CUDA, got {qweight.scheme}"
    return self_test.refusal(x.device, qweight.scheme, x.dtype)


def forward(
    *,
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    residual: Tensor | None,
) -> Tensor:
    """The contract of ``ops.quant_matmul``."""
    w = qweight
    # CPU kernels read fp32 and bf16
    narrow = x.dtype == torch.float16 and x.is_cpu
    if narrow:
        x, residual = x.float(), None if residual is None else residual.float()
    inputs = (x, w.packed, w.scales, w.zero_points, bias)
    rest = (w.scheme, w.group_size, w.shape[0])
    fused = not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (x, bias, residual)
    )
    # kernels gate panels, of which fp8 has none
    fused = fused and not (gated and format_of(w.scheme) in FP8)
    y: Tensor
    if fused:
        run = _on_cpu if x.is_cpu and is_plain((x, w.packed)) else _operator
        y = run(*inputs, residual, *rest, activation or "", gated)
    else:
        y = _operator(*inputs, None, *rest, "", False)
        turn = rows_in_turn(w.scheme, w.shape[0] // 2)
        y = finish(y, activation, gated, residual, turn)
    return y.half() if narrow else y
