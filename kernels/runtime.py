"""What every kernel here shares: the interpreter, products, refusals, and how it is launched.

Under ``TRITON_INTERPRET=1``, set before triton is imported, the same kernels run on CPU tensors,
slowly; the tests do that where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.library import refusal_of_transforms

INTERPRETED: bool = triton.knobs.runtime.interpret
# torch's dispatch keys of the devices that the kernels run on
DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Passed with every launch that does not say: triton 3.9 warns where the choice is left open.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32; PRECISION is ``product_precision`` of their dtype.

    Of fp8 Hopper's tensor cores keep sums of about 14 bits: each call has its own, and ``acc`` is
    added to it in fp32.
    """
    fp8: tl.constexpr = a.dtype.is_fp8()
    if _INTERPRETED:
        # numpy has no bf16: the interpreter would multiply its bit patterns
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if fp8 and acc is not None:
        acc += tl.dot(a, b)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def wide(index):
    """``index`` in 64 bits, before it is multiplied by a stride."""
    return tl.cast(index, tl.int64)


class Offline(NamedTuple):
    """A GPU that is not there: kernels are compiled for it, and not run."""

    architecture: int
    compile: Callable[..., None]


# set by offline.py
offline: Offline | None = None


def architecture(device: torch.device) -> int:
    """90 for Hopper and later, 80 for Ampere and Ada, 0 for older ones and the interpreter."""
    return _architecture(device) if offline is None else offline.architecture


@lru_cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return 90 if major >= 9 else 80 if major == 8 else 0


def programs(device: torch.device, tiles: int) -> int:
    """How many programs share ``tiles`` pieces of work: one for each multiprocessor, or fewer."""
    return min(tiles, multiprocessors(device))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 4  # interpreted or compiled only: few, so that each has several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[torch.device, int], Tensor] = {}


def zero_counters(count: int, device: torch.device) -> Tensor:
    """Int32[>= count] of zeros, which a launch leaves as it found them.

    Launches on two streams must not share them. A CUDA graph may be replayed on any stream: it gets
    counters of its own, zeroed in the graph.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    counters = _counters.get((device, stream))
    if counters is None or counters.numel() < count:
        counters = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _counters[device, stream] = counters
    return counters


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` with adjacent elements, copied only where they are not; None stays None."""
    return None if x is None else x.contiguous()


def product_precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply fp32: as three tf32 products, or one where torch is told so."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "tf32x3"
    return "tf32"


def refusal(*tensors: Tensor | None) -> str | None:
    """Why these tensors cannot go to a Triton kernel; None where they can."""
    if (reason := refusal_of_transforms()) is not None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cuda and not (INTERPRETED and tensor.is_cpu):
            return f"needs CUDA tensors, got {tensor.device}"
        if tensor.is_cuda and architecture(tensor.device) == 0:
            capability = torch.cuda.get_device_capability(tensor.device)
            return f"needs compute capability 8.0 or more, got {capability}"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"needs bfloat16, float16 or float32, got {tensor.dtype}"
        if tensor.layout is not torch.strided:
            return f"needs strided tensors, got {tensor.layout}"
    return None


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches inside go to ``device``; triton takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel writes its TMA descriptors; torch's allocator keeps it until it has run."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run ``kernel`` on the current stream of ``device``; all launches go through here."""
    if 0 in grid:
        return
    arguments = COMPILE_OPTIONS | arguments
    if offline is not None:
        offline.compile(kernel, grid, **arguments)
        return
    with on_device(device):
        # the allocator is kept per thread and context, and gradients run in threads of autograd's
        triton.set_allocator(_workspace)
        kernel[grid](**arguments)
