"""The definition of a lookup in a table, with positions and dropout."""

import torch.nn.functional as F
from torch import Tensor

from llmos_fast.dropout import dropout_rows
from llmos_fast.ops import check
from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


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
    x = upcast(F.embedding(ids, weight)) * scale
    if positions is not None:
        x = x + along(upcast(positions), ids, seq_dim)
    return dropout_rows(x, seed, dropout_p).to(weight.dtype)


def along(positions: Tensor, ids: Tensor, seq_dim: int) -> Tensor:
    """Float[seq width], shaped to be added to the rows of ``ids``, whose ``seq_dim`` is seq."""
    after = (1,) * (ids.dim() - 1 - seq_dim)
    return positions.reshape(positions.shape[0], *after, positions.shape[1])
