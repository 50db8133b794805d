"""gated_ffn on the CPU: three products; activation, gate and dropout where the second one ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.native.common import refusal
from llmos_fast.native.product import as_read, product, weight_gradients
from llmos_fast.native.product_activated import product_activated, product_gradients
from llmos_fast.reference import gated_ffn as definition


def unsupported(*, x: Tensor, w_gate: Tensor, **_: object) -> str | None:
    """Needs CPU tensors in fp32 or bf16."""
    return refusal(x, w_gate)


def forward(
    *,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    dropout_p: float,
    residual: Tensor | None,
    recompute: bool,
    seed: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.gated_ffn."""
    w_gate, w_up, w_down = as_read(w_gate, x), as_read(w_up, x), as_read(w_down, x)
    rows = x.reshape(-1, x.shape[-1])
    keep = torch.is_grad_enabled() and not recompute
    out, _, _ = _gated_ffn(
        rows, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, dropout_p, seed, keep
    )
    out = out.view(*x.shape[:-1], w_down.shape[0])
    return out if residual is None else residual + out  # type: ignore[no-any-return]


def _forward_cpu(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gate = product(x, w_gate, b_gate)
    hidden, up = product_activated(x, w_up, b_up, gate, activation, p, seed, keep)
    return product(hidden, w_down, b_down), gate if keep else gate.new_empty(0), up


def _forward_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    p: float,
    seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gate = x.new_empty(x.shape[0], w_gate.shape[0]) if keep else x.new_empty(0)
    return x.new_empty(x.shape[0], w_down.shape[0]), gate, torch.empty_like(gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.p, seed, ctx.kept = inputs
    ctx.save_for_backward(*tensors, seed, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


_NAMES = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


def _backward(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed, gate, up = ctx.saved_tensors
    if torch.is_grad_enabled():
        rest = {"activation": ctx.activation, "dropout_p": ctx.p, "seed": seed}
        rest |= {"residual": None, "recompute": False}
        named = dict(zip(_NAMES, tensors, strict=True))
        found = second_order(definition, named, rest, (d_out,))
        return (*found.values(), None, None, None, None)
    x, w_gate, w_up, w_down, b_gate, b_up, _ = tensors
    if not ctx.kept:
        gate, up = product(x, w_gate, b_gate), product(x, w_up, b_up)
    need = dict(zip(_NAMES, ctx.needs_input_grad, strict=False))
    d_gate, d_up, hidden = _hidden_backward(d_out, w_down, gate, up, ctx.activation, ctx.p, seed)
    d_x = product(d_gate, w_gate.t(), None) + product(d_up, w_up.t(), None) if need["x"] else None
    d_w_gate, d_b_gate = weight_gradients(d_gate, x, w_gate.dtype, need["w_gate"], need["b_gate"])
    d_w_up, d_b_up = weight_gradients(d_up, x, w_up.dtype, need["w_up"], need["b_up"])
    needs = need["w_down"], need["b_down"]
    d_w_down, d_b_down = weight_gradients(d_out, hidden, w_down.dtype, *needs)
    d_tensors = (d_x, d_w_gate, d_w_up, d_w_down, d_b_gate, d_b_up, d_b_down)
    return (*d_tensors, None, None, None, None)


def _hidden_backward_fake(
    d_out: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)


_gated_ffn = differentiable(
    "gated_ffn(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, Tensor? b_up, "
    "Tensor? b_down, str activation, float dropout_p, Tensor? seed, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
_hidden_backward = register(
    "gated_ffn_hidden_backward(Tensor d_out, Tensor w_down, Tensor gate, Tensor up, "
    "str activation, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    product_gradients,
    _hidden_backward_fake,
)
