"""ffn on the CPU: two products, and the activation with dropout where the first one ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.native.common import refusal
from llmos_fast.native.product import as_read, product, weight_gradients
from llmos_fast.native.product_activated import product_activated, product_gradients
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
    w1, w2 = as_read(w1, x), as_read(w2, x)
    rows = x.reshape(-1, x.shape[-1])
    keep = torch.is_grad_enabled() and not recompute
    out, _ = _ffn(rows, w1, b1, w2, b2, activation, dropout_p, seed, keep)
    out = out.view(*x.shape[:-1], out.shape[-1])
    return out if residual is None else residual + out  # type: ignore[no-any-return]


def _forward_cpu(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    hidden, gate = product_activated(x, w1, b1, None, activation, p, seed, keep)
    return product(hidden, w2, b2), gate


def _forward_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    gate = x.new_empty(x.shape[0], w1.shape[0]) if keep else x.new_empty(0)
    return x.new_empty(x.shape[0], w2.shape[0]), gate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, ctx.activation, ctx.p, seed, ctx.kept = inputs
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
    if not ctx.kept:
        gate = product(x, w1, b1)
    d_gate, hidden = _ffn_hidden_backward(d_out, w2, gate, ctx.activation, ctx.p, seed)
    return (
        product(d_gate, w1.t(), None) if need_x else None,
        *weight_gradients(d_gate, x, w1.dtype, need_w1, need_b1),
        *weight_gradients(d_out, hidden, w2.dtype, need_w2, need_b2),
        None,
        None,
        None,
        None,
    )


def _hidden_backward_cpu(
    d_out: Tensor, w2: Tensor, gate: Tensor, activation: str, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    d_gate, _, hidden = product_gradients(d_out, w2, gate, None, activation, p, seed)
    return d_gate, hidden


def _hidden_backward_fake(
    d_out: Tensor, w2: Tensor, gate: Tensor, activation: str, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate)


_ffn = differentiable(
    "ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, float dropout_p, "
    "Tensor? seed, bool keep) -> (Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
_ffn_hidden_backward = register(
    "ffn_hidden_backward(Tensor d_out, Tensor w2, Tensor gate, str activation, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor)",
    _hidden_backward_cpu,
    _hidden_backward_fake,
)
