"""The matrix product of all native ops, and the one table of who computes it.

csrc/cpu/product.inl takes any strides, so the gradients call it with transposed views. Nothing is
packed ahead: a cache of packed weights would go stale where a weight is written through ``.data``.
Beside x in bf16 it reads a weight in fp32, rounded as it is packed, and gives its gradient in fp32:
what autocast would copy twice, or thrice, is read once.

Few rows read the weight once from memory, whatever the arithmetic: csrc/cpu/linear_rows.inl. On 2
cores of an AMD Zen 4 it is ahead of both libraries up to 24 rows of fp32 and 48 of bf16. With all
of them held to AVX2 or SSE4 (DECISIONS.md), it is ahead or even up to 8 rows, but for one row of
bf16 on AVX2, and takes 0.5 to 1.4 times as long at 16.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast.library import differentiable, register
from llmos_fast.native.common import _C, address, dtype_code, large_empty

ROUTES = ("own", "onednn", "torch")

# one limit for all instruction sets: a captured step and a call of it must give the same bits
_FEW_ROWS = 16

# Below these the libraries, which pack less, are faster. 3072 x 768 by 128 / 256 / 512 rows in ms:
# fp32 own 3.2 / 6.0 / 12, F.linear 3.9 / 6.9 / 13, oneDNN between them; bf16 own 1.65 / 3.0 / 5.8,
# F.linear 1.6 / 3.0 / 5.8. What is packed serves all rows, so theirs is the largest limit. The
# gradient of that weight from 64 rows: own 1.7, oneDNN 2.1 (fp32).
_LEAST_ROWS, _LEAST_COLUMNS, _LEAST_DEPTH = 256, 128, 64
_LEAST_WORK, _LEAST_WORK_OF_ONEDNN = 2**23, 2**22


@cache
def asked() -> str:
    """What LLMOS_FAST_PRODUCT forces on every product of more than a few rows; "" if nothing."""
    name = os.environ.get("LLMOS_FAST_PRODUCT", "")
    if name and name not in ROUTES:
        raise ValueError(
            f"LLMOS_FAST_PRODUCT must be one of {', '.join(ROUTES)} (or empty for the table), "
            f"got {name!r}"
        )
    return name


@cache
def route(dtype: torch.dtype) -> str:
    """Who multiplies large matrices of ``dtype`` on this CPU: "own", "onednn" or "torch".

    fp32: torch sends it to MKL, which leaves a fifth (Zen 4) to two thirds (Zen 5) of the peak of
    AMD's CPUs unused. bf16: without instructions for it torch needs 5 to 100 times as long; with
    tiles of it (Intel's AMX) nothing is faster than torch's oneDNN.
    """
    if asked():
        # torch's way for bf16 is oneDNN
        return "torch" if asked() == "onednn" and dtype != torch.float32 else asked()
    sets = _C.cpu_sets()
    if "avx2" not in sets:
        return "torch"
    own = _is_amd() or (dtype == torch.bfloat16 and "avx512_bf16" not in sets)
    return "own" if own else "torch"


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def way(x: Tensor, weight: Tensor) -> str:
    """Who multiplies these: "few rows", or as ``route`` says, unless they are too small for it."""
    if takes_few_rows(x, weight):
        return "few rows"
    best = route(x.dtype)
    if best != "own" or asked():
        return best
    (rows, depth), columns = x.shape, weight.shape[0]
    work = rows * columns * depth
    large = rows >= _LEAST_ROWS and columns >= _LEAST_COLUMNS and depth >= _LEAST_DEPTH
    # torch multiplies bf16 element by element where the CPU has no instruction for it
    alone = x.dtype == torch.bfloat16 and "avx512_bf16" not in _C.cpu_sets()
    if work >= _LEAST_WORK and (large or alone):
        return "own"
    return "onednn" if x.dtype == torch.float32 and work >= _LEAST_WORK_OF_ONEDNN else "torch"


def as_read(weight: Tensor, x: Tensor) -> Tensor:
    """``weight`` in the dtype of x, or in fp32 beside bf16 where that is read without a copy."""
    if torch.compiler.is_compiling() or route(x.dtype) == "own":
        return weight
    return weight.to(x.dtype)


def _product_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN reads a strided one as if it were, and so do the kernels
    best = way(x, weight)
    if best == "own":
        return own_product(x, weight, bias, large_empty(x.shape[0], weight.shape[0], dtype=x.dtype))
    if best == "few rows":
        if weight.dtype == x.dtype:
            return _linear_rows(x, weight, bias)
        wide = None if bias is None else bias.float()
        return _linear_rows(x.float(), weight, wide).to(x.dtype)
    weight = weight.to(x.dtype)
    if best == "torch" or x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    linear: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return linear


def product_into(
    out: Tensor, x: Tensor, weight: Tensor, row_sums: Tensor | None, *, add: bool
) -> None:
    """``out`` becomes x weight^T, or where ``add`` that more than it was.

    ``row_sums``, where given, becomes the sums of the rows of x likewise. Both are contiguous, and
    of dtype fp32, or ``out`` of x's where nothing is added.
    """
    own = way(x, weight) == "own"
    # the kernel sums the columns that it packs; for an empty result that is none
    sums_too = own and x.stride(0) == 1 != x.stride(1) and out.numel() > 0
    if own:
        sums = address(row_sums) if sums_too else 0
        _C.product(*own_arguments(x, weight, None, out), dtype_code(out.dtype), add, sums)
    elif x.dtype == out.dtype:
        out.addmm_(x, weight.t(), beta=int(add))  # 0 does not read
    else:
        found = product(x, weight, None)
        out.add_(found) if add else out.copy_(found)
    if row_sums is not None and not sums_too:
        found = x.sum(1, dtype=torch.float32)
        row_sums.add_(found) if add else row_sums.copy_(found)


def own_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``out``, of x's dtype, after csrc/cpu/product.inl wrote x weight^T + bias there."""
    arguments = own_arguments(x, weight, bias, out)
    _C.product(*arguments, dtype_code(out.dtype), False, 0)
    return out


def own_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[int, ...]:
    """What the kernel of csrc/cpu/product.inl takes first; ``bias`` must be contiguous."""
    (rows, depth), columns = x.shape, weight.shape[0]
    return (
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        out.data_ptr(),
        rows,
        columns,
        depth,
        *x.stride(),
        weight.stride(1),
        weight.stride(0),
        dtype_code(x.dtype),
        dtype_code(weight.dtype),
    )


def takes_few_rows(x: Tensor, weight: Tensor) -> bool:
    """True where the weight's way from memory decides, and linear_rows.inl multiplies."""
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


def _product_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    need_bias = need_bias and ctx.has_bias
    d_x = product(d_out, weight.t(), None) if need_x else None
    if torch.is_grad_enabled():
        d_weight = product(d_out.t(), x.t(), None).to(weight.dtype) if need_weight else None
        return d_x, d_weight, d_out.sum(0) if need_bias else None
    return d_x, *weight_gradients(d_out, x, weight.dtype, need_weight, need_bias)


def weight_gradients(
    d_out: Tensor, x: Tensor, dtype: torch.dtype, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(d_out^T x in ``dtype``, sum of the rows of d_out), or None for what is not needed."""
    if not need_weight:
        return None, d_out.sum(0) if need_bias else None
    d_weight, d_bias = _weight_gradients(d_out, x, dtype, need_bias)
    return d_weight, d_bias if need_bias else None


def _weight_gradients_cpu(
    d_out: Tensor, x: Tensor, dtype: torch.dtype, need_bias: bool
) -> tuple[Tensor, Tensor]:
    d_weight = large_empty(d_out.shape[1], x.shape[1], dtype=dtype)
    own = way(d_out.t(), x.t()) == "own"
    d_bias = torch.empty(d_out.shape[1]) if need_bias and own else None
    product_into(d_weight, d_out.t(), x.t(), d_bias, add=False)
    if d_bias is not None:
        return d_weight, d_bias.to(x.dtype)
    # half the time of a sum in fp32 where d_out is bf16, and rounded once as well
    return d_weight, d_out.sum(0) if need_bias else x.new_empty(0)


def _weight_gradients_fake(
    d_out: Tensor, x: Tensor, dtype: torch.dtype, need_bias: bool
) -> tuple[Tensor, Tensor]:
    columns = d_out.shape[1]
    d_weight = x.new_empty(columns, x.shape[1], dtype=dtype)
    return d_weight, x.new_empty(columns if need_bias else 0)


_weight_gradients = register(
    "product_weight_gradients(Tensor d_out, Tensor x, ScalarType dtype, bool need_bias) "
    "-> (Tensor, Tensor)",
    _weight_gradients_cpu,
    _weight_gradients_fake,
)
# x: [rows, in], weight: [out, in], bias: [out] -> [rows, out]; any strides; in x's dtype, but
# that weight may be fp32 beside bf16
product = differentiable(
    "product(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _product_cpu,
    _product_fake,
    _setup_context,
    _backward,
)
