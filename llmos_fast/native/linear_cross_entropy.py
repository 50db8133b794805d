"""linear_cross_entropy on the CPU: blocks of rows, whose logits become their gradient in place.

The gradients of "mean" and "sum" are known up to one factor while the logits are still there, so
they are computed in the forward pass; "none" computes the logits again in the backward pass.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, is_plain, register, second_order
from llmos_fast.native.common import _C, contiguous, dtype_code, large_empty, refusal
from llmos_fast.native.product import as_read, own_product, product, product_into, way
from llmos_fast.reference import linear_cross_entropy as definition

# Logits of one block, in bytes. Twice as much gains 3 % in fp32 (8192 x 50257 x 768).
_BLOCK = 2**27


class _Kept(threading.local):
    """Memory for a block's logits, from call to call.

    The system zeroes what is fresh: 93 MB take it 9 ms, a sixth of the product that fills them.
    """

    memory = torch.empty(0)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Of unknown content, until the next call."""
        floats = -(-rows * columns * dtype.itemsize // 4)
        if self.memory.numel() < floats:
            self.memory = torch.empty(0)  # before its successor is allocated
            self.memory = large_empty(floats)
        return self.memory.view(dtype)[: rows * columns].view(rows, columns)


_kept = _Kept()

_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def unsupported(*, hidden: Tensor, weight: Tensor, **_: object) -> str | None:
    """Needs CPU tensors in fp32 or bf16, and at least one class."""
    if weight.shape[0] == 0:
        return "needs at least one class, got 0"
    return refusal(hidden, weight)


def forward(
    *,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """See llmos_fast.ops.linear_cross_entropy."""
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    if reduction == "none":
        losses: Tensor = _per_row(rows, weight, targets, bias, *options)
        return losses.view(target.shape)
    row_scale = torch.ones(targets.shape[0])
    if reduction == "mean":
        row_scale = row_scale / (targets != ignore_index).sum()
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    loss: Tensor = _reduced(rows, weight, targets, bias, row_scale, differentiated, *options)[0]
    return loss


def _in_blocks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [rows], and where ``row_scale`` is given the gradients of ``row_scale @ losses``.

    Returns (losses, d_hidden, d_weight, d_bias), the latter two in fp32.
    """
    rows, (classes, features) = hidden.shape[0], weight.shape
    weight, target = as_read(weight, hidden), target.contiguous()
    losses = torch.empty(rows)
    gradients = row_scale is not None
    d_hidden = torch.empty_like(hidden) if gradients else torch.empty(0, dtype=hidden.dtype)
    d_weight = large_empty(classes, features) if gradients else torch.empty(0)
    d_bias = torch.empty(classes if gradients and bias is not None else 0)
    bias_sums = None if bias is None else d_bias
    blocks = -(-rows // max(_BLOCK // (classes * hidden.itemsize), 1))
    block = -(-rows // max(blocks, 1))  # as large as one another
    for begin in range(0, rows, max(block, 1)):
        part = slice(begin, min(begin + block, rows))
        logits = _logits(hidden[part], weight, bias)
        _C.cross_entropy(
            logits.data_ptr(),
            target[part].data_ptr(),
            row_scale[part].data_ptr() if row_scale is not None else 0,
            losses[part].data_ptr(),
            logits.shape[0],
            classes,
            ignore_index,
            dtype_code(logits.dtype),
            label_smoothing,
            z_loss,
            softcap,
            gradients,
        )
        if gradients:
            d_hidden[part] = product(logits, weight.t(), None)
            product_into(d_weight, logits.t(), hidden[part].t(), bias_sums, add=begin > 0)
        del logits  # before the next block's are allocated, where they are
    if rows == 0:
        d_weight.zero_()
        d_bias.zero_()
    return losses, d_hidden, d_weight, d_bias


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if way(hidden, weight) != "own":
        return product(hidden, weight, bias)  # type: ignore[no-any-return]
    out = _kept.matrix(hidden.shape[0], weight.shape[0], hidden.dtype)
    return own_product(hidden, weight, contiguous(bias), out)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    classes, features = weight.shape
    return (
        hidden.new_empty(hidden.shape if gradients else (0,)),
        hidden.new_empty((classes, features) if gradients else (0,), dtype=torch.float32),
        hidden.new_empty(classes if gradients and bias is not None else 0, dtype=torch.float32),
    )


def _reduced_cpu(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    differentiated: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    scale = row_scale if differentiated else None
    losses, *gradients = _in_blocks(hidden, weight, target, bias, scale, *options)
    return ((losses * row_scale).sum(), *gradients)


def _reduced_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    differentiated: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return (loss, *_fake_gradients(hidden, weight, bias, differentiated))


def _reduced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, row_scale, _, *ctx.call = inputs
    ctx.save_for_backward(hidden, weight, target, bias, row_scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _reduced_backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias, row_scale, d_hidden, d_weight, d_bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        found = _second_order(ctx, hidden, weight, target, bias, d_loss * row_scale)
    else:
        if not (is_plain((d_loss,)) and d_loss.item() == 1.0):  # mostly it is: loss.backward()
            d_hidden = d_hidden * d_loss.to(d_hidden.dtype)
            d_weight, d_bias = d_weight * d_loss, d_bias * d_loss
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        found = (d_hidden, d_weight.to(weight.dtype), d_bias)
    return _arranged(ctx, found, 6)


def _per_row_cpu(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    return _in_blocks(hidden, weight, target, bias, None, *options)[0]


def _per_row_fake(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _per_row_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, _, _, _ = inputs
    ctx.call = inputs[4:]
    ctx.save_for_backward(*tensors)


def _per_row_backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        found = _second_order(ctx, hidden, weight, target, bias, d_losses)
    else:
        d_losses = d_losses.contiguous()
        call = (hidden, weight, target, bias, d_losses, *ctx.call)
        d_hidden, d_weight, d_bias = _per_row_gradients(*call)
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        found = (d_hidden, d_weight.to(weight.dtype), d_bias)
    return _arranged(ctx, found, 4)


def _per_row_gradients_cpu(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _in_blocks(hidden, weight, target, bias, row_scale, *options)[1:]


def _per_row_gradients_fake(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, bias, True)


def _second_order(
    ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, d_losses: Tensor
) -> tuple[Tensor | None, ...]:
    names = ("ignore_index", "label_smoothing", "z_loss", "softcap")
    rest = dict(zip(names, ctx.call, strict=True)) | {"target": target, "reduction": "none"}
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    return tuple(second_order(definition, tensors, rest, (d_losses,)).values())


def _arranged(ctx: Any, found: Any, inputs: int) -> tuple[Tensor | None, ...]:
    """Gradients in the order of the arguments: hidden, weight, target, bias, then options."""
    d_hidden, d_weight, d_bias = found
    needs = ctx.needs_input_grad
    return (
        d_hidden if needs[0] else None,
        d_weight if needs[1] else None,
        None,
        d_bias if needs[3] else None,
        *(None,) * inputs,
    )


_TENSORS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias"

_reduced = differentiable(
    f"linear_cross_entropy({_TENSORS}, Tensor row_scale, bool differentiated, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _reduced_cpu,
    _reduced_fake,
    _reduced_setup,
    _reduced_backward,
)
_per_row = differentiable(
    f"linear_cross_entropy_rows({_TENSORS}, {_OPTIONS}) -> Tensor",
    _per_row_cpu,
    _per_row_fake,
    _per_row_setup,
    _per_row_backward,
)
_per_row_gradients = register(
    f"linear_cross_entropy_rows_backward({_TENSORS}, Tensor row_scale, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _per_row_gradients_cpu,
    _per_row_gradients_fake,
)
