"""norm(residual + dropout(x)): what stands between any two sub-layers of a Transformer."""

from __future__ import annotations

from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.dropout import draw_seed
from llmos_fast.ops import check

implementations("add_norm", "native", "triton")

_OP = "add_norm"


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dropout, residual sum and normalisation of the last dimension in one pass.

        total = residual + dropout(x)
        "layer": norm = (total - mean) / sqrt(variance + eps) weight + bias   (Ba et al. 2016)
        "rms":   norm = total / sqrt(mean(total^2) + eps) weight + bias       (Zhang, Sennrich 2019)

    Args:
        x: Float[... features]; dropout bits are keyed on (row, column), see llmos_fast.dropout.
        residual: Float of the shape of ``x``, or None.
        weight: Float[features], or None for ones.
        bias: Float[features], or None for zeros.
        kind: "layer" or "rms".
        eps: positive.
        dropout_p: probability in [0, 1] with which elements of ``x`` are dropped.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        (norm, total), both Float[... features] in the promoted dtype of ``x`` and ``residual``.
        Statistics are computed in fp32 (fp64 for fp64), from ``total`` as it is returned.

    Gradients: x, residual, weight, bias, from both results.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    check.floating(_OP, x=x, residual=residual, weight=weight, bias=bias)
    check.require(x.dim() > 0, _OP, "x", "have at least 1 dimension", tuple(x.shape))
    check.shape(_OP, "residual", residual, x.shape, "that of x")
    check.shape(_OP, "weight", weight, x.shape[-1:], "features")
    check.shape(_OP, "bias", bias, x.shape[-1:], "features")
    check.require(kind in ("layer", "rms"), _OP, "kind", 'be "layer" or "rms"', repr(kind))
    check.require(eps > 0, _OP, "eps", "be positive", eps)
    check.probability(_OP, "dropout_p", dropout_p)
    return select(  # type: ignore[no-any-return]
        _OP,
        impl,
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        kind=kind,
        eps=float(eps),
        dropout_p=dropout_p,
        seed=draw_seed(dropout_p, x.device),
    )
