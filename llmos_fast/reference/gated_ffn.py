"""The definition of gated_ffn."""

import torch.nn.functional as F
from torch import Tensor

from llmos_fast.dropout import dropout_rows
from llmos_fast.reference.activation import ACTIVATIONS
from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(
    *,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    dropout_p: float,
    residual: Tensor | None,
    recompute: bool,
    seed: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.gated_ffn; ``recompute`` changes no result, and here no memory."""
    w_gate, w_up, w_down = (weight.to(x.dtype) for weight in (w_gate, w_up, w_down))
    gate = _linear(upcast(x), w_gate, b_gate)
    up = _linear(upcast(x), w_up, b_up)
    hidden = dropout_rows(ACTIVATIONS[activation](gate) * up, seed, dropout_p)
    out = _linear(hidden, w_down, b_down)
    return (out if residual is None else upcast(residual) + out).to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, upcast(weight), None if bias is None else upcast(bias))
