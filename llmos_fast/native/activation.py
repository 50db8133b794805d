"""dropout(activation(gate) * up) and its gradients on the CPU: csrc/cpu/activation.inl."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.native.common import _C, address, dropout_arguments, dtype_code

CODES = {"relu": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def activation_forward(
    gate: Tensor, up: Tensor | None, activation: str, p: float, seed: Tensor | None
) -> Tensor:
    """Hidden layer [rows, columns] from contiguous ``gate`` and ``up`` of that shape."""
    rows, columns = gate.shape
    hidden = torch.empty_like(gate)
    _C.activation_forward(
        gate.data_ptr(),
        address(up),
        hidden.data_ptr(),
        rows,
        columns,
        dtype_code(gate.dtype),
        CODES[activation],
        *dropout_arguments(seed, p),
    )
    return hidden


def activation_backward(
    gate: Tensor,
    up: Tensor | None,
    d_hidden: Tensor,
    activation: str,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_gate, d_up, hidden), all [rows, columns]; hidden is computed again, not stored."""
    rows, columns = gate.shape
    d_hidden = d_hidden.contiguous()
    d_gate, hidden = torch.empty_like(gate), torch.empty_like(gate)
    d_up = None if up is None else torch.empty_like(up)
    _C.activation_backward(
        gate.data_ptr(),
        address(up),
        d_hidden.data_ptr(),
        d_gate.data_ptr(),
        address(d_up),
        hidden.data_ptr(),
        rows,
        columns,
        dtype_code(gate.dtype),
        CODES[activation],
        *dropout_arguments(seed, p),
    )
    return d_gate, d_up, hidden
