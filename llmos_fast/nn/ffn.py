"""The feed-forward half of a Transformer layer, plain or gated, with any activation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.nn import plain
from llmos_fast.nn.quant_linear import QuantLinear

Activation = Callable[[Tensor], Tensor]


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
_FUNCTIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu2": squared_relu,
}
GATED: dict[str, Activation] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu"}


def activation_function(owner: str, activation: str | Activation) -> Activation:
    """The callable for an ``activation`` argument; ValueError for a name nobody knows."""
    if not isinstance(activation, str):
        return activation
    functions = {**_FUNCTIONS, **GATED}
    if activation not in functions:
        known = ", ".join(functions)
        raise ValueError(
            f"{owner}: activation must be a callable or one of {known}, got {activation!r}"
        )
    return functions[activation]


def is_gated(activation: str | Activation) -> bool:
    """True for the names of gated activations, which need a second input projection."""
    return isinstance(activation, str) and activation in GATED


def activation_name(activation: Activation) -> str | None:
    """The name that ops.ffn has for a callable; None for one that it does not know."""
    if isinstance(activation, nn.Module):
        if plain.is_observed(activation):
            return None
        if type(activation) is nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        return _MODULES.get(type(activation))
    if isinstance(activation, functools.partial):
        is_tanh = activation.func is F.gelu and activation.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if is_tanh and not activation.args else None
    return next((name for name, known in _FUNCTIONS.items() if activation is known), None)


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), times linear_up(x) before dropout where gated.

    Args:
        layer: has linear1, dropout, linear2, activation, and linear_up where it is gated; or
            gate_up, a quantized pair, in the place of linear1 and linear_up.
        x: Float[... d_model].

    Returns:
        Float[... d_model].
    """
    modules = layer._modules
    dropout, linear2 = modules["dropout"], modules["linear2"]
    assert dropout is not None
    assert linear2 is not None
    activation: Activation = layer.activation  # type: ignore[assignment]
    name = activation_name(activation)
    if "gate_up" in modules:
        hidden = modules["gate_up"](x, activation=name, gated=True)  # type: ignore[misc]
        return plain.linear(linear2, plain.dropout(dropout, hidden))
    linear1, linear_up = modules["linear1"], modules.get("linear_up")
    assert linear1 is not None
    linears = (linear1, linear2) if linear_up is None else (linear1, linear2, linear_up)
    if (
        name is not None
        and plain.is_plain(dropout, *plain.DROPOUT)
        and all(plain.is_plain(linear, *plain.LINEAR) for linear in linears)
    ):
        return _fused(x, linear1, linear2, linear_up, name, plain.dropout_probability(dropout))
    if name is not None and plain.is_plain(linear1, QuantLinear):
        hidden = linear1(x, activation=name)
    else:
        hidden = activation(plain.linear(linear1, x))
    if linear_up is not None:
        hidden = hidden * plain.linear(linear_up, x)
    return plain.linear(linear2, plain.dropout(dropout, hidden))


def _fused(
    x: Tensor,
    linear1: nn.Module,
    linear2: nn.Module,
    linear_up: nn.Module | None,
    activation: str,
    dropout_p: float,
) -> Tensor:
    w1, b1, w2, b2 = linear1.weight, linear1.bias, linear2.weight, linear2.bias
    if linear_up is None:
        return ops.ffn(x, w1, b1, w2, b2, activation=activation, dropout_p=dropout_p)  # type: ignore[arg-type]
    return ops.gated_ffn(
        x,
        w1,  # type: ignore[arg-type]
        linear_up.weight,  # type: ignore[arg-type]
        w2,  # type: ignore[arg-type]
        b_gate=b1,  # type: ignore[arg-type]
        b_up=linear_up.bias,  # type: ignore[arg-type]
        b_down=b2,  # type: ignore[arg-type]
        activation=activation,
        dropout_p=dropout_p,
    )
