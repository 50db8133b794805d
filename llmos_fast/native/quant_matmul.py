"""quant_matmul on csrc: C++ SIMD on CPUs; on GPUs a dequantizing kernel and torch's own matmul."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import llmos_fast._C as _C
from llmos_fast.library import LIBRARY, differentiable, register
from llmos_fast.native.common import address
from llmos_fast.quantize import FORMATS, QuantizedWeight, format_of, rounds_activations
from llmos_fast.reference.quant_matmul import apply_activation

try:
    import llmos_fast._CUDA as _CUDA
except ImportError:
    _CUDA = None

_ACTIVATIONS = {"": 0, "relu": 1, "relu2": 2, "gelu": 3, "gelu_tanh": 4, "silu": 5}
# 127 * 128 * 131072 is the largest sum of products that int32 holds
_MAX_INTEGER_K = 131072


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dequantize(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    # the tensors are named until the kernel returns: an address alone keeps none of them alive
    parts = (packed.contiguous(), scales.contiguous(), _contiguous(zero_points))
    code = FORMATS.index(format_of(scheme))
    out = torch.empty((packed.shape[0], columns), dtype=dtype, device=packed.device)
    addresses = [address(part) for part in parts]
    if packed.is_cuda:
        assert _CUDA is not None
        with torch.cuda.device(packed.device):
            stream = torch.cuda.current_stream().cuda_stream
            _CUDA.dequantize(
                *addresses, out.data_ptr(), *out.shape, group_size, code, str(dtype)[6:], stream
            )
        return out
    narrow = dtype == torch.bfloat16
    target = out if narrow or dtype == torch.float32 else out.float()
    _C.dequantize(*addresses, target.data_ptr(), *out.shape, group_size, code, narrow)
    return target.to(dtype)


def _dequantize_fake(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty((packed.shape[0], columns), dtype=dtype, device=packed.device)


dequantize = register(
    "dequantize(Tensor packed, Tensor scales, Tensor? zero_points, str scheme, int group_size, "
    "SymInt columns, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
LIBRARY.impl("dequantize", _dequantize, "CUDA")


def _quant_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    group_size: int,
    activation: str,
) -> Tensor:
    if x.is_cuda:
        weight = _dequantize(packed, scales, zero_points, scheme, group_size, x.shape[-1], x.dtype)
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return apply_activation(y, activation or None)
    x, packed, scales = x.contiguous(), packed.contiguous(), scales.contiguous()
    zero_points = _contiguous(zero_points)
    bias = None if bias is None else bias.float().contiguous()
    n, k = packed.shape[0], x.shape[-1]
    out = x.new_empty((*x.shape[:-1], n))
    if out.numel():
        _C.quant_matmul(
            x.data_ptr(),
            packed.data_ptr(),
            scales.data_ptr(),
            address(zero_points),
            address(bias),
            out.data_ptr(),
            x.numel() // k,
            n,
            k,
            group_size,
            FORMATS.index(format_of(scheme)),
            _ACTIVATIONS[activation],
            rounds_activations(scheme),
            x.dtype == torch.bfloat16,
        )
    return out


def _quant_matmul_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    scheme: str,
    group_size: int,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, zero_points, bias, scheme, group_size, activation = inputs
    ctx.save_for_backward(packed, scales, zero_points)
    ctx.scheme, ctx.group_size, ctx.activation = scheme, group_size, activation
    ctx.columns = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.activation:  # forward() fuses none where gradients are wanted
        raise RuntimeError("llmos_fast::quant_matmul: no gradient through a fused activation")
    packed, scales, zero_points = ctx.saved_tensors
    x_gradient = bias_gradient = None
    if ctx.needs_input_grad[0]:
        weight = dequantize(
            packed, scales, zero_points, ctx.scheme, ctx.group_size, ctx.columns, gradient.dtype
        )
        x_gradient = gradient @ weight
    if ctx.needs_input_grad[4]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        bias_gradient = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return x_gradient, None, None, None, bias_gradient, None, None, None


_operator = differentiable(
    "quant_matmul(Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, Tensor? bias, "
    "str scheme, int group_size, str activation) -> Tensor",
    _quant_matmul,
    _quant_matmul_fake,
    _setup_context,
    _backward,
)
LIBRARY.impl("quant_matmul", _quant_matmul, "CUDA")


def unsupported(
    *, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None, activation: str | None
) -> str | None:
    """None, or what the kernels need and what they got."""
    if x.dtype == torch.float64:
        return "computes in fp32: it needs float32, bfloat16 or float16, got float64"
    integer = rounds_activations(qweight.scheme)
    if x.device.type == "cpu":
        if integer and x.shape[-1] > _MAX_INTEGER_K:
            return f"sums in int32: it needs K <= {_MAX_INTEGER_K}, got {x.shape[-1]}"
        return None
    if x.device.type != "cuda":
        return f"needs a CPU or CUDA tensor, got {x.device.type}"
    if _CUDA is None:
        return "needs the CUDA extension, which was not built (no nvcc at install time)"
    if integer or format_of(qweight.scheme) == "fp8":
        return f"takes int8, int4, int4_asym and nf4 with _a16 on CUDA, got {qweight.scheme}"
    return None


def forward(
    *, x: Tensor, qweight: QuantizedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """The contract of ``ops.quant_matmul``."""
    with_gradients = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    fused = "" if activation is None or with_gradients else activation
    # CPU kernels read fp32 and bf16
    narrow = x.dtype == torch.float16 and x.device.type == "cpu"
    y: Tensor = _operator(
        x.float() if narrow else x,
        qweight.packed,
        qweight.scales,
        qweight.zero_points,
        bias,
        qweight.scheme,
        qweight.group_size,
        fused,
    )
    y = apply_activation(y, None if fused else activation)
    return y.to(x.dtype)
