"""The gated feed-forward network: SwiGLU, GeGLU, ReGLU."""

from __future__ import annotations

from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.dropout import draw_seed
from llmos_fast.ops import check
from llmos_fast.ops.ffn import check_activation
from llmos_fast.ops.linear import check_weight

implementations("gated_ffn", "native", "triton")

_OP = "gated_ffn"


def gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """dropout(activation(x w_gate^T + b_gate) (x w_up^T + b_up)) w_down^T + b_down + residual.

    Source: Shazeer 2020, "GLU variants improve Transformer": "silu" gives SwiGLU, "gelu" GeGLU.

    Args:
        x: Float[... features].
        w_gate: Float[hidden features]; weights are in the dtype of ``x``, or float32 beside
            16 bits: then they count as rounded to those, and get their gradients in float32.
        w_up: Float[hidden features].
        w_down: Float[out hidden].
        b_gate: Float[hidden], or None.
        b_up: Float[hidden], or None.
        b_down: Float[out], or None.
        activation: "relu", "relu2" (squared), "gelu" (erf), "gelu_tanh" or "silu".
        dropout_p: probability with which elements of the hidden layer are dropped, by bits keyed
            on (row, hidden column), see llmos_fast.dropout.
        residual: Float[... out] added to the result, or None.
        recompute: compute arguments of the activation again for the gradients instead of keeping
            them: one product more, and nothing as large as the hidden layer stays in memory.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[... out] in the dtype of ``x``; under autocast in its dtype.

    Gradients: x, residual and all weights and biases.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    x, b_gate, b_up, b_down, residual = check.autocast(  # type: ignore[assignment]
        x, b_gate, b_up, b_down, residual
    )
    w_gate, w_up, w_down = check.autocast_weights(w_gate, w_up, w_down)
    weights = {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    biases = {"b_gate": b_gate, "b_up": b_up, "b_down": b_down}
    check.floating(_OP, x=x, **weights, **biases, residual=residual)
    check.same_dtype(_OP, x=x, **biases, residual=residual)
    check.weight_dtype(_OP, x, **weights)
    check_weight(_OP, "w_gate", w_gate, x)
    check.shape(_OP, "w_up", w_up, w_gate.shape, "hidden features")
    check.shape(_OP, "w_down", w_down, (w_down.shape[0], w_gate.shape[0]), "out hidden")
    check.shape(_OP, "b_gate", b_gate, w_gate.shape[:1], "hidden")
    check.shape(_OP, "b_up", b_up, w_gate.shape[:1], "hidden")
    check.shape(_OP, "b_down", b_down, w_down.shape[:1], "out")
    check.shape(_OP, "residual", residual, (*x.shape[:-1], w_down.shape[0]), "... out")
    check_activation(_OP, activation)
    check.probability(_OP, "dropout_p", dropout_p)
    seed = draw_seed(dropout_p, x.device)
    return select(  # type: ignore[no-any-return]
        _OP,
        impl,
        x=x,
        **weights,
        **biases,
        activation=activation,
        dropout_p=dropout_p,
        residual=residual,
        recompute=recompute,
        seed=seed,
    )
