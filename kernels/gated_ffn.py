"""gated_ffn on the GPU: both projections in one tile, and their gradients in one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.reference import gated_ffn as definition

from .column_sum import sum_rows
from .epilogue import Epilogue
from .ffn_backward import Activated, hidden_gradients
from .matrix import matrix, optional_matrix
from .philox import dropout_numbers
from .product import flat, needs_gradients, product
from .runtime import DEVICES, contiguous, refusal

TENSORS = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down", "residual")


def unsupported(
    *, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, **_: object
) -> str | None:
    """Needs CUDA tensors in bf16, fp16 or fp32."""
    return refusal(x, w_gate, w_up, w_down)


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
    rows, added = flat(x), None if residual is None else flat(residual)
    weights = (weight.to(x.dtype) for weight in (w_gate, w_up, w_down))
    tensors = (rows, *weights, b_gate, b_up, b_down, added)
    store = needs_gradients(tensors) and not recompute
    out, _, _ = _gated_ffn(*tensors, seed, activation, dropout_p, store)
    return out.view(*x.shape[:-1], w_down.shape[0])  # type: ignore[no-any-return]


def _forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (x.new_empty(x.shape[0], w_gate.shape[0] if store else 0) for _ in range(2))
    epilogue = Epilogue(
        contiguous(b_gate),
        contiguous(b_up),
        dropout_numbers(seed, p),
        pre=matrix(gate) if store else None,
        pre_up=matrix(up) if store else None,
    )
    hidden = product(x, w_gate, epilogue, activation=activation, right_up=w_up)
    affine = Epilogue(contiguous(b_down), residual=optional_matrix(residual))
    return product(hidden, w_down, affine), gate, up


def _forward_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gate = x.new_empty(x.shape[0], w_gate.shape[0] if store else 0)
    return x.new_empty(x.shape[0], w_down.shape[0]), gate, torch.empty_like(gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, seed, ctx.activation, ctx.p, ctx.store = inputs
    ctx.save_for_backward(*tensors[:-1], seed, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w_gate, w_up, w_down, b_gate, b_up, b_down, seed, gate, up = ctx.saved_tensors
    need = dict(zip(TENSORS, ctx.needs_input_grad, strict=False))
    d_residual = d_out if need.pop("residual") else None
    if torch.is_grad_enabled():
        tensors = (x, w_gate, w_up, w_down, b_gate, b_up, b_down)
        rest = {
            "activation": ctx.activation, "dropout_p": ctx.p, "seed": seed,
            "residual": None, "recompute": False,
        }  # fmt: skip
        found = second_order(definition, dict(zip(need, tensors, strict=True)), rest, (d_out,))
        return (*found.values(), d_residual, None, None, None, None)
    stored = (gate, up) if ctx.store else (None, None)
    found = _gated_ffn_backward(
        d_out, x, w_gate, w_up, w_down, b_gate, b_up, seed, *stored,
        ctx.activation, ctx.p, list(need.values()),
    )  # fmt: skip
    gradients = (g if wanted else None for g, wanted in zip(found, need.values(), strict=True))
    return (*gradients, d_residual, None, None, None, None)


def _backward_kernel(
    d_out: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    seed: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    activation: str,
    p: float,
    need: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_gate, need_up, need_down, need_b_gate, need_b_up, need_b_down = need
    again = Activated(
        x=x, weight=w_gate, weight_up=w_up, bias=contiguous(b_gate), bias_up=contiguous(b_up)
    )
    found = hidden_gradients(
        d_out,
        w_down,
        again if gate is None else Activated(gate, up),
        dropout_numbers(seed, p),
        activation=activation,
        need_hidden=need_down,
        need_bias=need_b_gate,
        need_bias_up=need_b_up,
    )
    assert found.d_up is not None
    none = x.new_empty(0)
    return (
        torch.addmm(found.d_pre @ w_gate, found.d_up, w_up) if need_x else none,
        found.d_pre.t() @ x if need_gate else none,
        found.d_up.t() @ x if need_up else none,
        none if found.hidden is None else d_out.t() @ found.hidden,
        none if found.d_bias is None else found.d_bias,
        none if found.d_bias_up is None else found.d_bias_up,
        sum_rows(d_out, d_out.dtype) if need_b_down else none,
    )


def _backward_fake(
    d_out: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    seed: Tensor | None,
    gate: Tensor | None,
    up: Tensor | None,
    activation: str,
    p: float,
    need: list[bool],
) -> tuple[Tensor, ...]:
    hidden, out = w_gate.shape[:1], w_down.shape[:1]
    shapes = (x.shape, w_gate.shape, w_up.shape, w_down.shape, hidden, hidden, out)
    return tuple(x.new_empty(s if n else (0,)) for s, n in zip(shapes, need, strict=True))


_gated_ffn = differentiable(
    "gated_ffn_triton(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, "
    "Tensor? b_up, Tensor? b_down, Tensor? residual, Tensor? seed, str activation, "
    "float dropout_p, bool store) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
_gated_ffn_backward = register(
    "gated_ffn_triton_backward(Tensor d_out, Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, "
    "Tensor? b_gate, Tensor? b_up, Tensor? seed, Tensor? gate, Tensor? up, str activation, "
    "float dropout_p, bool[] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
    DEVICES,
)
