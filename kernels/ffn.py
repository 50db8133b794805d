"""ffn on the GPU: activation and dropout in the epilogues of its two products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.reference import ffn as definition

from .column_sum import sum_rows
from .epilogue import Epilogue
from .ffn_backward import Activated, hidden_gradients
from .matrix import matrix, optional_matrix
from .philox import dropout_numbers
from .product import flat, needs_gradients, product
from .runtime import DEVICES, contiguous, refusal

TENSORS = ("x", "w1", "b1", "w2", "b2", "residual")


def unsupported(*, x: Tensor, w1: Tensor, w2: Tensor, **_: object) -> str | None:
    """Needs CUDA tensors in bf16, fp16 or fp32."""
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
    rows, added = flat(x), None if residual is None else flat(residual)
    tensors = (rows, w1.to(x.dtype), b1, w2.to(x.dtype), b2, added)
    store = needs_gradients(tensors) and not recompute
    out, _ = _ffn(*tensors, seed, activation, dropout_p, store)
    return out.view(*x.shape[:-1], w2.shape[0])  # type: ignore[no-any-return]


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
    store: bool,
) -> tuple[Tensor, Tensor]:
    pre = x.new_empty(x.shape[0], w1.shape[0] if store else 0)
    kept = matrix(pre) if store else None
    epilogue = Epilogue(contiguous(b1), dropout=dropout_numbers(seed, p), pre=kept)
    hidden = product(x, w1, epilogue, activation=activation)
    return product(hidden, w2, Epilogue(contiguous(b2), residual=optional_matrix(residual))), pre


def _forward_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    activation: str,
    p: float,
    store: bool,
) -> tuple[Tensor, Tensor]:
    pre = x.new_empty(x.shape[0], w1.shape[0] if store else 0)
    return x.new_empty(x.shape[0], w2.shape[0]), pre


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, _, seed, ctx.activation, ctx.p, ctx.store = inputs
    ctx.save_for_backward(x, w1, b1, w2, b2, seed, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w1, b1, w2, b2, seed, pre = ctx.saved_tensors
    *need, need_residual = ctx.needs_input_grad[: len(TENSORS)]
    d_residual = d_out if need_residual else None
    if torch.is_grad_enabled():
        tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
        rest = {
            "activation": ctx.activation, "dropout_p": ctx.p, "seed": seed,
            "residual": None, "recompute": False,
        }  # fmt: skip
        found = second_order(definition, tensors, rest, (d_out,)).values()
        return (*found, d_residual, None, None, None, None)
    found = _ffn_backward(
        d_out, x, w1, b1, w2, seed, pre if ctx.store else None, ctx.activation, ctx.p, need
    )
    gradients = (g if wanted else None for g, wanted in zip(found, need, strict=True))
    return (*gradients, d_residual, None, None, None, None)


def _backward_kernel(
    d_out: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    seed: Tensor | None,
    pre: Tensor | None,
    activation: str,
    p: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_w1, need_b1, need_w2, need_b2 = need
    again = Activated(x=x, weight=w1, bias=contiguous(b1))
    found = hidden_gradients(
        d_out,
        w2,
        again if pre is None else Activated(pre),
        dropout_numbers(seed, p),
        activation=activation,
        need_hidden=need_w2,
        need_bias=need_b1,
        need_bias_up=False,
    )
    none = x.new_empty(0)
    return (
        found.d_pre @ w1 if need_x else none,
        found.d_pre.t() @ x if need_w1 else none,
        none if found.d_bias is None else found.d_bias,
        none if found.hidden is None else d_out.t() @ found.hidden,
        sum_rows(d_out, d_out.dtype) if need_b2 else none,
    )


def _backward_fake(
    d_out: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    seed: Tensor | None,
    pre: Tensor | None,
    activation: str,
    p: float,
    need: list[bool],
) -> tuple[Tensor, ...]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    return tuple(x.new_empty(s if n else (0,)) for s, n in zip(shapes, need, strict=True))


_ffn = differentiable(
    "ffn_triton(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
    "Tensor? seed, str activation, float dropout_p, bool store) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
_ffn_backward = register(
    "ffn_triton_backward(Tensor d_out, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? seed, "
    "Tensor? pre, str activation, float dropout_p, bool[] need) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
    DEVICES,
)
