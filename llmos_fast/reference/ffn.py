"""The definition of ffn."""

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
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout_p: float,
    residual: Tensor | None,
    recompute: bool,
    seed: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.ffn; ``recompute`` changes no result, and here no memory."""
    w1, w2 = w1.to(x.dtype), w2.to(x.dtype)
    hidden = ACTIVATIONS[activation](
        F.linear(upcast(x), upcast(w1), None if b1 is None else upcast(b1))
    )
    hidden = dropout_rows(hidden, seed, dropout_p)
    out = F.linear(hidden, upcast(w2), None if b2 is None else upcast(b2))
    return (out if residual is None else upcast(residual) + out).to(x.dtype)
