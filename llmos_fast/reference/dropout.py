"""The definition of dropout with a residual."""

from torch import Tensor

from llmos_fast.dropout import dropout_rows
from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(*, x: Tensor, residual: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """See llmos_fast.ops.dropout."""
    dropped = dropout_rows(upcast(x), seed, dropout_p)
    if residual is None:
        return dropped.to(x.dtype)
    total = upcast(residual) + dropped
    return total.to((x.new_empty(0) + residual.new_empty(0)).dtype)
