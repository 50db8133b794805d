"""residual + dropout(x): what a pre-norm block, an embedding and a positional encoding end with."""

from __future__ import annotations

from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.dropout import draw_seed
from llmos_fast.ops import check

implementations("dropout", "native", "triton")

_OP = "dropout"


def dropout(x: Tensor, p: float, residual: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Zero each element with probability ``p``, scale the others by 1 / (1 - p), add ``residual``.

    Args:
        x: Float[... columns]; the bits are keyed on (row, column), see llmos_fast.dropout.
        p: probability in [0, 1].
        residual: Float of the shape of ``x``.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[... columns] in the promoted dtype of ``x`` and ``residual``.

    Gradients: x, residual.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    check.floating(_OP, x=x, residual=residual)
    check.probability(_OP, "p", p)
    check.require(x.dim() > 0, _OP, "x", "have at least 1 dimension", tuple(x.shape))
    check.shape(_OP, "residual", residual, x.shape, "that of x")
    return select(  # type: ignore[no-any-return]
        _OP, impl, x=x, residual=residual, dropout_p=p, seed=draw_seed(p, x.device)
    )
