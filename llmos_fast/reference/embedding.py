"""The definition of a lookup in a table."""

import torch.nn.functional as F
from torch import Tensor

from llmos_fast.ops import check


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(*, ids: Tensor, weight: Tensor) -> Tensor:
    """See llmos_fast.ops.embedding."""
    check.rows_exist("embedding", "ids", ids, weight.shape[0], "weight")
    return F.embedding(ids, weight)
