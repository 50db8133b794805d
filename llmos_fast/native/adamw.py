"""AdamW on the CPU: csrc/cpu/adamw.inl. No op: llmos_fast.optim calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.library import is_plain
from llmos_fast.native.common import _C, dtype_code, refusal

Tensors = list[Tensor]


def unsupported(parameters: list[tuple[Tensor, ...]]) -> str | None:
    """Needs contiguous CPU tensors; those of one parameter are all fp32 or all bf16.

    parameters: each with its gradient, and with its moments where there are some
    """
    tensors = [tensor for group in parameters for tensor in group]
    if not is_plain(tuple(tensors)):
        return "needs ordinary tensors, outside of torch.compile and dispatch modes"
    # hundreds of tensors are of one kind or two: one of each is looked at
    kinds = {(t.dtype, t.is_cpu, t.layout): t for t in tensors}
    if (reason := refusal(*kinds.values())) is not None:
        return reason
    for tensor in tensors:
        if not tensor.is_contiguous():
            return f"needs contiguous tensors, got strides {tensor.stride()}"
    if len(kinds) > 1:
        for parameter, *others in parameters:
            for other in others:
                if other.dtype != parameter.dtype:
                    got = f"{parameter.dtype} and {other.dtype}"
                    return f"needs one dtype for a parameter and its gradient, got {got}"
    return None


def step(
    parameters: Tensors,
    gradients: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    gradient_factor: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of torch.optim.AdamW in place, for gradients times ``gradient_factor``."""
    if not parameters:  # torch refuses empty lists
        return
    torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)  # a third of a Python number's time
    _C.adamw_step(
        [p.data_ptr() for p in parameters],
        [g.data_ptr() for g in gradients],
        [m.data_ptr() for m in exp_avgs],
        [v.data_ptr() for v in exp_avg_sqs],
        [p.numel() for p in parameters],
        [dtype_code(p.dtype) for p in parameters],
        [s.item() for s in steps],
        gradient_factor,
        lr,
        *betas,
        eps,
        weight_decay,
    )
    torch.autograd.graph.increment_version([*parameters, *exp_avgs, *exp_avg_sqs])


def gradient_norm(gradients: Tensors) -> float:
    """Square root of the sum of all squares."""
    return float(
        _C.gradient_norm(
            [g.data_ptr() for g in gradients],
            [g.numel() for g in gradients],
            [dtype_code(g.dtype) for g in gradients],
        )
    )
