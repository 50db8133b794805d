"""The definition of add_norm."""

import torch
from torch import Tensor

from llmos_fast.reference.dropout import forward as dropout_add
from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(
    *,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.add_norm."""
    total = dropout_add(x=x, residual=residual, dropout_p=dropout_p, seed=seed)
    row = upcast(total)
    if kind == "layer":
        row = row - row.mean(-1, keepdim=True)
    norm = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        norm = norm * upcast(weight)
    if bias is not None:
        norm = norm + upcast(bias)
    return norm.to(total.dtype), total
