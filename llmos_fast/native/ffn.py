"""ffn on the CPU: two routed products, and the activation with dropout in one pass between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, is_plain, register, second_order
from llmos_fast.native.activation import activation_backward, activation_forward
from llmos_fast.native.common import refusal
from llmos_fast.native.product import product, product_activated
from llmos_fast.reference import ffn as definition


def unsupported(*, x: Tensor, w1: Tensor, w2: Tensor, **_: object) -> str | None:
    """Needs CPU tensors in fp32 or bf16."""
    return refusal(x, w1, w2)


def forward(
    *,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    dropout_p: float,
    residual: Tensor | None,
    recompute: bool,
    seed: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.ffn."""
    rows = x.reshape(-1, x.shape[-1])
    if seed is None and not torch.is_grad_enabled() and is_plain((x, w1, b1, w2, b2)):
        hidden = product_activated(rows, w1, b1, activation)
        if hidden is not None:
            return _shaped(product(hidden, w2, b2), x, residual)
    out, _ = _ffn(rows, w1, b1, w2, b2, activation, dropout_p, seed, recompute)
    return _shaped(out, x, residual)


def _shaped(out: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
    out = out.view(*x.shape[:-1], out.shape[-1])
    return out if residual is None else residual + out


def _forward_cpu(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    gate = product(x, w1, b1)
    out = product(activation_forward(gate, None, activation, p, seed), w2, b2)
    return out, gate.new_empty(0) if recompute else gate


def _forward_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    gate = x.new_empty(0) if recompute else x.new_empty(x.shape[0], w1.shape[0])
    return x.new_empty(x.shape[0], w2.shape[0]), gate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, ctx.activation, ctx.p, seed, ctx.recompute = inputs
    ctx.save_for_backward(x, w1, b1, w2, b2, seed, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w1, b1, w2, b2, seed, gate = ctx.saved_tensors
    if torch.is_grad_enabled():
        tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
        rest = {"activation": ctx.activation, "dropout_p": ctx.p, "seed": seed}
        rest |= {"residual": None, "recompute": False}
        found = second_order(definition, tensors, rest, (d_out,))
        return (*found.values(), None, None, None, None)
    need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
    if ctx.recompute:
        gate = product(x, w1, b1)
    d_hidden = product(d_out, w2.t(), None)
    d_gate, hidden = _ffn_activation_backward(gate, d_hidden, ctx.activation, ctx.p, seed)
    return (
        product(d_gate, w1.t(), None) if need_x else None,
        product(d_gate.t(), x.t(), None) if need_w1 else None,
        d_gate.sum(0) if need_b1 else None,
        product(d_out.t(), hidden.t(), None) if need_w2 else None,
        d_out.sum(0) if need_b2 else None,
        None,
        None,
        None,
        None,
    )


def _activation_backward_cpu(
    gate: Tensor, d_hidden: Tensor, activation: str, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    d_gate, _, hidden = activation_backward(gate, None, d_hidden, activation, p, seed)
    return d_gate, hidden


def _activation_backward_fake(
    gate: Tensor, d_hidden: Tensor, activation: str, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate)


_ffn = differentiable(
    "ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, float dropout_p, "
    "Tensor? seed, bool recompute) -> (Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
_ffn_activation_backward = register(
    "ffn_activation_backward(Tensor gate, Tensor d_hidden, str activation, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor)",
    _activation_backward_cpu,
    _activation_backward_fake,
)
