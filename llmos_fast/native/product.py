"""The matrix product of all native ops, and the one routing table of the libraries that do it.

Measured on 2 cores of an AMD Zen 5 (torch 2.13), GFLOP/s of x weight^T, (1024 x 768) (768 x 3072):
fp32 MKL 179, oneDNN 427; bf16 oneDNN 702 by either way. MKL gives AMD CPUs a third of their peak,
so there fp32 goes to oneDNN, which reads any strides and so serves the gradients without copies.
Nothing is packed ahead: a cache of packed weights would gain 3-5 % from 256 rows up, and would go
stale where a weight is written through ``.data``.

Few rows read the weight once from memory, whatever the arithmetic: csrc/cpu/linear_rows.inl. On 2
cores of an AMD Zen 4 it is ahead of both libraries up to 24 rows of fp32 and 48 of bf16. With all
of them held to AVX2 or SSE4 (DECISIONS.md), it is ahead or even up to 8 rows, but for one row of
bf16 on AVX2, and takes 0.5 to 1.4 times as long at 16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast.library import differentiable
from llmos_fast.native.common import _C, address, dtype_code

# one limit for all instruction sets: a captured step and a call of it must give the same bits
_FEW_ROWS = 16


@cache
def route() -> str:
    """Library of fp32 products on this CPU: "onednn" or "mkl" (torch's own choice)."""
    if not torch.backends.mkldnn.is_available():
        return "mkl"
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return "onednn" if amd else "mkl"


def _product_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = x.shape[0], weight.shape[0]
    bias = _dense(bias)
    if _takes_few_rows(x, weight):
        return _linear_rows(x, weight, bias)
    empty = rows == 0 or columns == 0 or x.shape[1] == 0
    if empty or x.dtype != torch.float32 or not _worth_onednn(x, weight):
        return F.linear(x, weight, bias)
    linear: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return linear


def _dense(bias: Tensor | None) -> Tensor | None:
    # oneDNN reads a strided bias as if it were contiguous
    return None if bias is None else bias.contiguous()


def _takes_few_rows(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] <= _FEW_ROWS and x.stride(1) == weight.stride(1) == 1


def _linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (rows, features), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=x.dtype)
    _C.linear_rows(
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        out.data_ptr(),
        rows,
        columns,
        features,
        x.stride(0),
        weight.stride(0),
        dtype_code(x.dtype),
    )
    return out


def _worth_onednn(x: Tensor, weight: Tensor) -> bool:
    # a single row of a small weight is a dot product per output: 5 us in MKL, 14 in oneDNN
    tiny = x.shape[0] == 1 and weight.numel() < 2**18
    return route() == "onednn" and not tiny


# names of the activations that oneDNN computes in the product's accumulator
_EPILOGUES = {
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def product_activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor | None:
    """activation(x weight^T + bias) without gradients in one pass; None where no library has it."""
    known = activation in _EPILOGUES and x.dtype == torch.float32 and x.numel() > 0
    few = _takes_few_rows(x, weight)  # faster in two passes
    if not known or few or weight.shape[0] == 0 or not _worth_onednn(x, weight):
        return None
    name, algorithm = _EPILOGUES[activation]
    activated: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, _dense(bias), name, [], algorithm
    )
    return activated


def _product_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    d_x = product(d_out, weight.t(), None) if need_x else None
    d_weight = product(d_out.t(), x.t(), None) if need_weight else None
    d_bias = d_out.sum(0) if need_bias and ctx.has_bias else None
    return d_x, d_weight, d_bias


# x: [rows, in], weight: [out, in], bias: [out] -> [rows, out]; any strides
product = differentiable(
    "product(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _product_cpu,
    _product_fake,
    _setup_context,
    _backward,
)
