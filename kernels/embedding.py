"""embedding on the GPU: torch's lookup, then dropout with its bits in one kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmos_fast.ops import check
from llmos_fast.reference.embedding import along

from . import dropout


def unsupported(*, weight: Tensor, **_: object) -> str | None:
    """What dropout takes."""
    return dropout.unsupported(x=weight, residual=None)


def forward(
    *,
    ids: Tensor,
    weight: Tensor,
    scale: float,
    positions: Tensor | None,
    seq_dim: int,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.embedding."""
    check.rows_exist("embedding", "ids", ids, weight.shape[0], "weight")
    x = F.embedding(ids, weight)
    if scale != 1.0:
        x = x * scale
    if positions is not None:
        x = x + along(positions, ids, seq_dim)
    return dropout.forward(x=x, residual=None, dropout_p=dropout_p, seed=seed)
