"""Products whose sums become hidden layers or gradients of them before they reach memory.

Each is a product and csrc/cpu/activation.inl in one (csrc/cpu/product_epilogue.inl) where the own
kernel multiplies, else one after the other. Tensors are [rows, columns] in one dtype.
"""

from __future__ import annotations

from torch import Tensor

from llmos_fast.native.activation import CODES, activation_backward, activation_forward
from llmos_fast.native.common import _C, address, contiguous, dropout_arguments, large_empty
from llmos_fast.native.product import own_arguments, product, way

# enum Finish of csrc/cpu/kernels.h
_ACTIVATE, _GATE, _GRADIENTS = 1, 2, 3


def product_activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(hidden, sums) with sums = x weight^T + bias; sums is empty unless ``keep``.

    hidden = dropout(activation(sums)), or dropout(activation(gate) * sums) where there is a gate.
    """
    nothing = x.new_empty(0)
    if way(x, weight) != "own":
        sums = product(x, weight, bias)
        first, second = (sums, None) if gate is None else (gate, sums)
        hidden = activation_forward(first, second, activation, p, seed)
        return hidden, sums if keep else nothing
    bias = contiguous(bias)
    sizes = x.shape[0], weight.shape[0]
    hidden = large_empty(*sizes, dtype=x.dtype)
    kept = large_empty(*sizes, dtype=x.dtype) if keep else None
    _C.product_activated(
        *own_arguments(x, weight, bias, hidden),
        _ACTIVATE if gate is None else _GATE,
        CODES[activation],
        address(gate),
        0,
        address(kept),
        0,
        0,
        *dropout_arguments(seed, p),
    )
    return hidden, nothing if kept is None else kept


def product_gradients(
    d_out: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_gate, d_up, hidden) where d_out weight is the gradient of hidden, computed again."""
    transposed = weight.t()
    if way(d_out, transposed) != "own":
        d_hidden = product(d_out, transposed, None)
        return activation_backward(gate, up, d_hidden, activation, p, seed)
    d_gate, hidden = (large_empty(*gate.shape, dtype=gate.dtype) for _ in range(2))
    d_up = None if up is None else large_empty(*up.shape, dtype=up.dtype)
    _C.product_activated(
        *own_arguments(d_out, transposed, None, d_gate),
        _GRADIENTS,
        CODES[activation],
        gate.data_ptr(),
        address(up),
        0,
        address(d_up),
        hidden.data_ptr(),
        *dropout_arguments(seed, p),
    )
    return d_gate, d_up, hidden
