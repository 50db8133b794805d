"""quant_matmul on csrc/cuda.

Rounded activations multiply stored weights; up to MAX_ROWS rows of floating-point ones likewise,
and more rows a dense weight.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmos_fast.native.common import FORMAT_CODES, address, contiguous, rows_contiguous
from llmos_fast.quantize import rounds_activations
from llmos_fast.reference.quant_matmul import finish

try:
    import llmos_fast._CUDA as _CUDA
except ImportError:
    _CUDA = None

# beyond, tiles of rows decode the weight so often that a dense one pays: an estimate
MAX_ROWS = 256
ACTIVATION_CODES = {"": -1, "relu": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}

_counters: dict[tuple[torch.device, int], Tensor] = {}
_avoids_warpgroups: set[torch.device] = set()


def is_built() -> bool:
    """Whether there is a CUDA extension."""
    return _CUDA is not None


def extension_path() -> Path:
    """Where it lies."""
    return Path(_CUDA.__file__)


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (rows, columns) in ``dtype``: fp32, bf16 or fp16."""
    # the tensors are named until the kernel returns: an address alone keeps none of them alive
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    parts = (_aligned(packed), scales.contiguous(), contiguous(zero_points))
    addresses = [address(part) for part in parts]
    shape = (rows, columns, group_size, FORMAT_CODES[scheme])
    with torch.cuda.device(packed.device):
        stream = torch.cuda.current_stream().cuda_stream
        device, name = packed.device.index, str(dtype)[6:]
        _CUDA.dequantize(device, *addresses, out.data_ptr(), *shape, name, stream)
    return out


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
    """The contract of ``ops.quant_matmul`` for weights that lie in panels."""
    k = x.shape[-1]
    rows = x.numel() // k
    rest = (packed, scales, zero_points, bias, residual, scheme, group_size, n, activation, gated)
    if rounds_activations(scheme):
        return rounded_rows(x, *rest)
    if 0 < rows <= MAX_ROWS and multiplies(x.device, x.dtype):
        return few_rows(x, *rest)
    weight = dequantize(packed, scales, zero_points, scheme, group_size, n, k, x.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return finish(y, activation or None, gated, residual)


@lru_cache
def multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for few rows in floating point: of 16 bits."""
    return dtype.itemsize == 2 and has_room(device)


def has_room(device: torch.device) -> bool:
    """Whether an SM has the shared memory of an A100: that of many other GPUs is 100 KB."""
    properties = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_multiprocessor >= 164 * 1024)


@lru_cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether it is a Hopper GPU and the extension has kernels for warpgroups."""
    return bool(_CUDA.has_warpgroups(device.index))


def avoid_warpgroups(device: torch.device) -> None:
    """From now on it multiplies as the GPUs before it."""
    _avoids_warpgroups.add(device)


def uses_warpgroups(device: torch.device) -> bool:
    """Whether it has them and does not avoid them."""
    return has_warpgroups(device) and device not in _avoids_warpgroups


def few_rows(x: Tensor, *rest: Any) -> Tensor:
    """As ``product``, for 1 to MAX_ROWS rows where the GPU ``multiplies``."""
    return _launch("quant_matmul", x, aligned_rows(x), *rest)


def rounded_rows(x: Tensor, *rest: Any) -> Tensor:
    """As ``product``, for schemes that round activations and a GPU that ``has_room``."""
    return _launch("integer_matmul", x, rows_contiguous(x.reshape(-1, x.shape[-1])), *rest)


def _launch(
    kernel: str,
    x: Tensor,
    rows: Tensor,
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
    """The kernel's result for ``rows``, which are those of x."""
    # named until the launch, as above
    packed, scales = _aligned(packed), _aligned(scales)
    zero_points = None if zero_points is None else _aligned(zero_points)
    bias, residual = contiguous(bias), contiguous(residual)
    out = x.new_empty((*x.shape[:-1], n // 2 if gated else n))
    if out.numel() == 0:
        return out
    shape = (rows.shape[0], n, x.shape[-1], group_size, FORMAT_CODES[scheme])
    how = str(x.dtype)[6:], uses_warpgroups(x.device)
    with torch.cuda.device(x.device):
        tiles, splits, workspace_bytes = _plan(kernel, x.device.index, *shape, *how)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=x.device)
        counters = _zero_counters(tiles, x.device) if splits > 1 else None
        getattr(_CUDA, kernel)(
            x.device.index,
            rows.data_ptr(),
            rows.stride(0),
            address(packed),
            address(scales),
            address(zero_points),
            address(bias),
            bias is not None and bias.dtype == torch.float32,
            address(residual),
            out.data_ptr(),
            *shape,
            ACTIVATION_CODES[activation],
            gated,
            *how,
            splits,
            address(workspace),
            address(counters),
            torch.cuda.current_stream().cuda_stream,
        )
    return out


def aligned_rows(x: Tensor) -> Tensor:
    """Rows of x as 16-byte copies need them: they begin at 16 bytes, zeros fill up 8 elements."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    fits = k % 8 == 0 and rows.stride(1) == 1 and rows.data_ptr() % 16 == 0
    if fits and (rows.stride(0) % 8 == 0 or rows.shape[0] == 1):
        return rows
    filled = rows.new_zeros((rows.shape[0], -(-k // 8) * 8))
    filled[:, :k] = rows
    return filled


@lru_cache(maxsize=4096)
def _plan(kernel: str, *call: int | str) -> tuple[int, int, int]:
    """(tiles, parts of each, bytes of workspace)."""
    plan: tuple[int, int, int] = getattr(_CUDA, f"{kernel}_plan")(*call)
    return plan


def _zero_counters(count: int, device: torch.device) -> Tensor:
    """Int32[>= count] of zeros, which a launch leaves as it found them.

    Launches on two streams must not share them. A CUDA graph may be replayed on any stream: it gets
    counters of its own, zeroed in the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    counters = _counters.get(key)
    if counters is None or counters.numel() < count:
        counters = _counters[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return counters


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at 16 bytes, as all that torch allocates."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
