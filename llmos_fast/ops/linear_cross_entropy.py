"""Cross-entropy of a linear output layer, without its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check
from llmos_fast.ops.linear import check_weight

implementations("linear_cross_entropy", "native", "triton")

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """F.cross_entropy(F.linear(hidden, weight, bias), target), which never holds all the logits.

        logits = hidden weight^T + bias;  logits = softcap tanh(logits / softcap)
        loss = logsumexp(logits) - (1 - label_smoothing) logits[target]
               - label_smoothing mean(logits) + z_loss logsumexp(logits)^2

    Sources: Wijmans et al. 2024, "Cut your losses"; z-loss: Chowdhery et al. 2022, PaLM.

    Args:
        hidden: Float[... features].
        weight: Float[classes features]; in the dtype of ``hidden``, or float32 beside 16 bits:
            then it counts as rounded to those, and gets its gradient in float32.
        target: Int64[...], the shape of ``hidden`` without its last dimension; classes in
            [0, classes), or ``ignore_index``.
        bias: Float[classes], or None.
        ignore_index: positions with this target count nothing, in loss and gradients.
        label_smoothing: in [0, 1].
        z_loss: weight of the squared log-sum-exp, at least 0.
        softcap: tanh limit of the logits; 0 switches it off.
        reduction: "mean" over the positions that count, "sum" or "none".
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float32[] for "mean" and "sum" (NaN for the mean over no position, as torch), Float32[...]
        with 0 at ignored positions for "none"; float64 for float64 input.

    Gradients: hidden, weight, bias.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    hidden, bias = check.autocast(hidden, bias)  # type: ignore[assignment]
    (weight,) = check.autocast_weights(weight)
    check.floating(_OP, hidden=hidden, weight=weight, bias=bias)
    check.same_dtype(_OP, hidden=hidden, bias=bias)
    check.weight_dtype(_OP, hidden, weight=weight)
    check_weight(_OP, "weight", weight, hidden)
    check.shape(_OP, "bias", bias, weight.shape[:1], "classes")
    check.shape(_OP, "target", target, hidden.shape[:-1], "hidden without its last dimension")
    check.require(target.dtype == torch.int64, _OP, "target", "be int64", target.dtype)
    check.probability(_OP, "label_smoothing", label_smoothing)
    check.require(z_loss >= 0, _OP, "z_loss", "be at least 0", z_loss)
    check.require(softcap >= 0, _OP, "softcap", "be at least 0", softcap)
    valid = reduction in ("mean", "sum", "none")
    check.require(valid, _OP, "reduction", 'be "mean", "sum" or "none"', repr(reduction))
    if not torch.compiler.is_compiling():
        _check_classes(target, weight.shape[0], ignore_index)
    losses = select(
        _OP,
        impl,
        hidden=hidden,
        weight=weight,
        target=target,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        softcap=float(softcap),
        reduction=reduction,
    )
    return losses  # type: ignore[no-any-return]


def _check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """On the CPU only: elsewhere it would wait for the device."""
    if target.device.type != "cpu" or target.numel() == 0:
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        rule = f"be in [0, {classes}) or ignore_index = {ignore_index}"
        check.require(False, _OP, "target", rule, target[wrong][0].item())
