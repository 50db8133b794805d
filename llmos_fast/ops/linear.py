"""x weight^T + bias: the matrix product, on the fastest library that the machine has for it."""

from __future__ import annotations

from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check

implementations("linear", "native")

_OP = "linear"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Affine map of the last dimension, as torch.nn.functional.linear.

    Args:
        x: Float[... in_features].
        weight: Float[out_features in_features] in the dtype of ``x``, or float32 beside 16 bits:
            then it counts as rounded to those, and gets its gradient in float32.
        bias: Float[out_features].
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[... out_features] in the dtype of ``x``; under autocast in its dtype.

    Gradients: x, weight, bias.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    x, bias = check.autocast(x, bias)  # type: ignore[assignment]
    (weight,) = check.autocast_weights(weight)
    check.floating(_OP, x=x, weight=weight, bias=bias)
    check.same_dtype(_OP, x=x, bias=bias)
    check.weight_dtype(_OP, x, weight=weight)
    check_weight(_OP, "weight", weight, x)
    check.shape(_OP, "bias", bias, (weight.shape[0],), "out_features")
    return select(_OP, impl, x=x, weight=weight, bias=bias)  # type: ignore[no-any-return]


def check_weight(op: str, argument: str, weight: Tensor, x: Tensor) -> None:
    """``weight`` is Float[out_features in_features] and ``x`` ends with in_features."""
    check.require(weight.dim() == 2, op, argument, "have 2 dimensions", tuple(weight.shape))
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        rule = f"end with the in_features of {argument}, {weight.shape[1]}"
        check.require(False, op, "last dimension of x", rule, tuple(x.shape))
