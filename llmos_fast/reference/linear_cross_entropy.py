"""The definition of linear_cross_entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(
    *,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """See llmos_fast.ops.linear_cross_entropy."""
    weight = weight.to(hidden.dtype)
    logits = F.linear(upcast(hidden), upcast(weight), None if bias is None else upcast(bias))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    counts = target != ignore_index
    chosen = logits.gather(-1, target.clamp(0, weight.shape[0] - 1).unsqueeze(-1)).squeeze(-1)
    lse = torch.logsumexp(logits, dim=-1)
    losses = lse - (1 - label_smoothing) * chosen - label_smoothing * logits.mean(-1)
    losses = (losses + z_loss * lse.square()).masked_fill(~counts, 0.0)
    losses = losses.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()
