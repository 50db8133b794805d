"""The position-wise feed-forward network of a Transformer block."""

from __future__ import annotations

from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.dropout import draw_seed
from llmos_fast.ops import check
from llmos_fast.ops.linear import check_weight

implementations("ffn", "native", "triton")

_OP = "ffn"
ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """dropout(activation(x w1^T + b1)) w2^T + b2 + residual (Vaswani et al. 2017, eq. 2).

    Args:
        x: Float[... features].
        w1: Float[hidden features]; weights are in the dtype of ``x``, or float32 beside 16 bits:
            then they count as rounded to those, and get their gradients in float32.
        b1: Float[hidden], or None.
        w2: Float[out hidden].
        b2: Float[out], or None.
        activation: "relu", "relu2" (squared), "gelu" (erf), "gelu_tanh" or "silu".
        dropout_p: probability with which elements of the hidden layer are dropped, by bits keyed
            on (row, hidden column), see llmos_fast.dropout.
        residual: Float[... out] added to the result, or None.
        recompute: compute arguments of the activation again for the gradients instead of keeping
            them: one product more, and nothing as large as the hidden layer stays in memory.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[... out] in the dtype of ``x``; under autocast in its dtype.

    Gradients: x, w1, b1, w2, b2, residual.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    x, b1, b2, residual = check.autocast(x, b1, b2, residual)  # type: ignore[assignment]
    w1, w2 = check.autocast_weights(w1, w2)
    check.floating(_OP, x=x, w1=w1, b1=b1, w2=w2, b2=b2, residual=residual)
    check.same_dtype(_OP, x=x, b1=b1, b2=b2, residual=residual)
    check.weight_dtype(_OP, x, w1=w1, w2=w2)
    check_weight(_OP, "w1", w1, x)
    check.shape(_OP, "b1", b1, w1.shape[:1], "hidden")
    check.shape(_OP, "w2", w2, (w2.shape[0], w1.shape[0]), "out hidden")
    check.shape(_OP, "b2", b2, w2.shape[:1], "out")
    check.shape(_OP, "residual", residual, (*x.shape[:-1], w2.shape[0]), "... out")
    check_activation(_OP, activation)
    check.probability(_OP, "dropout_p", dropout_p)
    return select(  # type: ignore[no-any-return]
        _OP,
        impl,
        x=x,
        w1=w1,
        b1=b1,
        w2=w2,
        b2=b2,
        activation=activation,
        dropout_p=dropout_p,
        residual=residual,
        recompute=recompute,
        seed=draw_seed(dropout_p, x.device),
    )


def check_activation(op: str, activation: str) -> None:
    """``activation`` is one of the names that every implementation knows."""
    rule = f"be one of {', '.join(ACTIVATIONS)}"
    check.require(activation in ACTIVATIONS, op, "activation", rule, repr(activation))
