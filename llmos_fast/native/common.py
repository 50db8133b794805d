"""What the bridges to csrc/cpu share: the module, dtype codes, addresses, common refusals."""

from __future__ import annotations

import torch
from torch import Tensor

# torch is imported first, so that the extension finds torch's own OpenMP runtime already loaded
import llmos_fast._C as _C
from llmos_fast.dropout import keep_scale, threshold
from llmos_fast.library import refusal_of_transforms
from llmos_fast.quantize import FORMATS, SCHEMES, format_of

__all__ = [
    "FORMAT_CODES",
    "_C",
    "address",
    "contiguous",
    "dropout_arguments",
    "dtype_code",
    "large_empty",
    "refusal",
    "rows_contiguous",
]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# WeightFormat of csrc/quant_formats.h, which has no fp8_block
FORMAT_CODES = {
    scheme: FORMATS.index(format_of(scheme))
    for scheme in SCHEMES
    if format_of(scheme) != "fp8_block"
}
# glibc keeps no larger piece for the next call
_ALWAYS_FRESH = 2**25


def dtype_code(dtype: torch.dtype) -> int:
    """Number of the dtype in csrc/cpu/kernels.h."""
    return _DTYPES[dtype]


def address(tensor: Tensor | None) -> int:
    """Where the data begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor``, or a copy that is contiguous; None for None."""
    return None if tensor is None else tensor.contiguous()


def large_empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty, on huge pages where malloc takes fresh memory each time: a fault per page."""
    memory = torch.empty(shape, dtype=dtype)
    if memory.nbytes >= _ALWAYS_FRESH:
        _C.prefer_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def rows_contiguous(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def dropout_arguments(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    """(address of the seed, threshold, scale) as the kernels take them."""
    return (0, 0, 1.0) if seed is None else (seed.data_ptr(), threshold(p), keep_scale(p))


def refusal(*tensors: Tensor | None) -> str | None:
    """Why these tensors cannot go to a CPU kernel; None where they can."""
    if (reason := refusal_of_transforms()) is not None:
        return reason
    for tensor in tensors:
        if tensor is None or (
            tensor.is_cpu and tensor.dtype in _DTYPES and tensor.layout is torch.strided
        ):
            continue
        if not tensor.is_cpu:
            return f"needs CPU tensors, got {tensor.device}"
        if tensor.dtype not in _DTYPES:
            return f"needs float32 or bfloat16, got {tensor.dtype}"
        return f"needs strided tensors, got {tensor.layout}"
    return None
