"""What the bridges to csrc/cpu share: the module, dtype codes, addresses, common refusals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# torch is imported first, so that the extension finds torch's own OpenMP runtime already loaded
import llmos_fast._C as _C
from llmos_fast.dropout import keep_scale, threshold

__all__ = ["_C", "address", "dropout_arguments", "dtype_code", "refusal", "second_order"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def dtype_code(dtype: torch.dtype) -> int:
    """Number of the dtype in csrc/cpu/kernels.h."""
    return _DTYPES[dtype]


def address(tensor: Tensor | None) -> int:
    """Where the data begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dropout_arguments(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    """(address of the seed, threshold, scale) as the kernels take them."""
    return (0, 0, 1.0) if seed is None else (seed.data_ptr(), threshold(p), keep_scale(p))


def refusal(*tensors: Tensor | None) -> str | None:
    """Why these tensors cannot go to a CPU kernel; None where they can."""
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "needs tensors outside of torch.func transforms"
        if torch._C._get_tracing_state() is not None:
            return "needs tensors outside of torch.jit.trace"
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


def second_order(
    definition: Any,
    tensors: dict[str, Tensor | None],
    rest: dict[str, Any],
    gradients: tuple[Any, ...],
) -> dict[str, Tensor | None]:
    """Gradients that can be differentiated again, computed through the op's definition.

    Args:
        definition: the reference module of the op.
        tensors: differentiable arguments by name, as they were saved.
        rest: the other arguments of ``definition.forward``.
        gradients: of its outputs, None where an output was not used.
    """
    outputs = definition.forward(**tensors, **rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (o, g)
        for o, g in zip(outputs, gradients, strict=False)
        if g is not None and o.requires_grad
    ]
    if not pairs:
        return dict.fromkeys(tensors)
    wanted = {n: t for n, t in tensors.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(wanted.values()),
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    return {**dict.fromkeys(tensors), **dict(zip(wanted, found, strict=True))}
