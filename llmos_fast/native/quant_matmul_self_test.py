"""Whether this GPU computes what quant_matmul's CUDA kernels say, asked before their first use.

Integers and powers of two have one right product, however it is summed: the kernels have to give
exactly what plain torch gives in float64 from the weight's definition, for each of them, off every
tile, with and without parts of k, again and again. That is asked once for each GPU, scheme and
dtype: what passed is kept for the next process.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from llmos_fast import verdicts as kept
from llmos_fast.formats import FOUR_BIT
from llmos_fast.native import quant_matmul_cuda as cuda
from llmos_fast.quantize import (
    GROUP_SIZES,
    QuantizedWeight,
    format_of,
    from_codes,
    rounds_activations,
)
from llmos_fast.reference.quant_matmul import finish, round_activations

# n, k and whether pairs are gated: many parts of k, and one; columns for tiles of 128 rows; off
# every tile
SIZES = ((2064, 4104, False), (2080, 4104, True), (300, 43, False), (8232, 1544, False))
ROWS = (1, 13, 27, 64, 150)  # of x: one for each kernel, and several tiles of the largest
ROUNDS = 10

Function = Callable[..., Tensor]

_lock = threading.Lock()
# the device, the scheme, the dtype, and whether Hopper's warpgroups are among the kernels
Key = tuple[torch.device, str, torch.dtype, bool]
_verdicts: dict[Key, str | None] = {}


def refusal(device: torch.device, scheme: str, dtype: torch.dtype) -> str | None:
    """Why the kernels must not be used for ``dtype``; None where they passed.

    While tensors are fake nothing can be tested: the operator asks again when it runs. A CUDA graph
    that is captured before the test gets the reference.
    """
    if not rounds_activations(scheme):
        scheme = f"{format_of(scheme)}_a16"
    key = device, scheme, dtype, cuda.uses_warpgroups(device)
    if key not in _verdicts:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return None
        with _lock:
            reason = _settle(device, scheme, dtype)
        # without warpgroups from now on, the kernels may be others
        return refusal(device, scheme, dtype) if reason is None else reason
    return _verdicts[key]


# what is traced above is a constant; as in kernels/self_test.py
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _settle(device: torch.device, scheme: str, dtype: torch.dtype) -> str | None:
    """Note a verdict down, or that warpgroups are avoided; None, or why there is none yet."""
    warpgroups = cuda.uses_warpgroups(device)
    key = device, scheme, dtype, warpgroups
    if key in _verdicts:
        return None
    if rounds_activations(scheme) and not cuda.has_room(device):
        _verdicts[key] = f"needs 164 KB of shared memory in an SM for {scheme}"
        return None
    environment = _environment(device)
    name = f"{scheme}, {dtype}{', warpgroups' if warpgroups else ''}"
    if kept.load(environment).get(name):
        _verdicts[key] = None
        return None
    if torch.cuda.is_current_stream_capturing():
        return "needs a first call outside of a CUDA graph, for its self-test"
    try:
        failure = _failure(device, scheme, dtype)
    except torch.OutOfMemoryError:
        return "needs more free memory on the GPU for its self-test"
    if failure is not None and warpgroups:
        cuda.avoid_warpgroups(device)
        _warn(f"{failure}; it goes on without Hopper's own instructions")
        return None
    _verdicts[key] = failure
    if failure is None:
        kept.store(environment, kept.load(environment) | {name: True})
    else:
        _warn(f"{failure}; it is not used")
    return None


@lru_cache
def _environment(device: torch.device) -> dict[str, str]:
    """What a verdict depends on."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "compute capability": str(torch.cuda.get_device_capability(device)),
        "extension": hashlib.sha256(cuda.extension_path().read_bytes()).hexdigest(),
        "test": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }


def _failure(device: torch.device, scheme: str, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels, in words; None where they pass."""
    product: Function | None = None
    if rounds_activations(scheme):
        product = cuda.rounded_rows
    elif cuda.multiplies(device, dtype):
        product = cuda.few_rows
    try:
        if passes(product, cuda.dequantize, device, scheme, dtype):
            return None
        failure = "gives results that are not exact"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        failure = str(error)
    gpu = torch.cuda.get_device_name(device)
    return f"fails its self-test for {scheme} and {dtype} on the {gpu}: {failure}"


def _warn(what: str) -> None:
    warnings.warn(f"llmos_fast: quant_matmul in CUDA {what}", stacklevel=2)


def passes(
    product: Function | None,
    dequantize: Function,
    device: torch.device,
    scheme: str,
    dtype: torch.dtype,
) -> bool:
    """Whether these functions, in the place of quant_matmul_cuda's, give exact results."""
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    random = torch.Generator(device).manual_seed(0)
    rounded = rounds_activations(scheme)
    for (n, k, gated), group_size in itertools.product(SIZES, GROUP_SIZES):
        weight = _weight(random, n, k, scheme, group_size)
        parts, group_size = (weight.packed, weight.scales, weight.zero_points), weight.group_size
        dense = weight.dequantize(dtype)
        wrong |= (dequantize(*parts, scheme, group_size, n, k, dtype) != dense).any()
        if product is None:
            continue
        for rows in ROWS:
            x, bias, residual = _inputs(random, rows, n, k, gated, dtype)
            wide = x.double()
            if rounded:
                x = _with_scales_of_one(x, group_size)
                integers, x_scales = round_activations(x, scheme, group_size)
                wide = integers.double() * x_scales.double()
            y = (wide @ dense.double().T + bias.double()).float()
            expected = finish(y, "relu" if gated else None, gated, residual).to(dtype)
            rest = (bias, residual, scheme, group_size, n, "relu" if gated else "", gated)
            for _ in range(ROUNDS):
                wrong |= (product(x, *parts, *rest) != expected).any()
    return not bool(wrong)


def _integers(random: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=random, device=random.device)


def _weight(
    random: torch.Generator, n: int, k: int, scheme: str, group_size: int
) -> QuantizedWeight:
    """Random codes; scales are powers of two, so that scale times level is not rounded."""
    name = format_of(scheme)
    groups = -(-k // group_size) if name in FOUR_BIT else 1
    codes = _integers(random, 0, 15 if name in FOUR_BIT else 255, n, k).to(torch.uint8)
    signs = 2 * _integers(random, 0, 1, n, groups) - 1
    zeros = _integers(random, 0, 15, n, groups) if name == "int4_asym" else None
    scales = signs * 2.0 ** _integers(random, -8, -6, n, groups)
    return from_codes(codes, scales, zeros, scheme, group_size)


def _inputs(
    random: torch.Generator, rows: int, n: int, k: int, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, bias and residual: few and small numbers, so that no sum needs more than fp32's 24 bits.

    A gate's product with its partner is rounded to fp32: nothing may be added to it.
    """
    signs = _integers(random, -1, 1, rows, k)
    x = (signs * (_integers(random, 0, 7, rows, k) == 0)).to(dtype)
    bias = (_integers(random, -4, 4, n) / 64).to(dtype)
    return x, bias, None if gated else (_integers(random, -4, 4, rows, n) / 64).to(dtype)


def _with_scales_of_one(x: Tensor, group_size: int) -> Tensor:
    """Halfway between integers where x is not 0, and 127 in every group."""
    x = 2.5 * x
    x[:, ::group_size] = 127
    return x
