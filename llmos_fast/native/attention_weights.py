"""attention_weights on the CPU: the attention kernels, and the weights by torch beside them.

Gradients of the output thus come from the kernels, and nothing of the size of the scores is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, second_order
from llmos_fast.native import attention, dropout
from llmos_fast.native.common import refusal
from llmos_fast.reference.attention import probabilities

_SCHEMA = (
    "Tensor query, Tensor key, Tensor? mask, Tensor? bias, Tensor? key_lengths, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, str causal, int window_left, "
    "int window_right, float softcap, float dropout_p, float scale, bool average_heads"
)
_NAMES = tuple(argument.split()[1] for argument in _SCHEMA.split(", "))
_DIFFERENTIABLE = ("query", "key", "bias", "sinks")


def unsupported(*, query: Tensor, bias: Tensor | None, **_: object) -> str | None:
    """Needs CPU tensors in fp32 or bf16."""
    return refusal(query, bias)


def forward(*, value: Tensor, average_heads: bool, **call: Any) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.attention_weights."""
    out = attention.forward(value=value, return_lse=False, **call)
    assert isinstance(out, Tensor)
    left, right = call["window"]
    call |= {"window_left": left, "window_right": right, "average_heads": average_heads}
    return out, _weights(*(call[name] for name in _NAMES))


class _Composition:
    """The definition of the weights, but for the dropout: its bits in PyTorch take 20 times longer
    than all the rest.
    """

    @staticmethod
    def forward(
        *,
        query: Tensor,
        seed: Tensor | None,
        window_left: int,
        window_right: int,
        dropout_p: float,
        average_heads: bool,
        **scores: Any,
    ) -> Tensor:
        weights, _ = probabilities(
            query=query,
            packed=None,
            window=(window_left, window_right),
            dropout_p=0.0,
            seed=None,
            **scores,
        )
        # rows and columns are counted as in the attention kernels
        weights = dropout.forward(x=weights, residual=None, dropout_p=dropout_p, seed=seed)
        return (weights.mean(1) if average_heads else weights).to(query.dtype)


def _forward_cpu(*arguments: Any) -> Tensor:
    return _Composition.forward(**dict(zip(_NAMES, arguments, strict=True)))


def _forward_fake(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    batch, heads_q, seq_q, _ = query.shape
    average_heads = rest[-1]
    heads = () if average_heads else (heads_q,)
    return query.new_empty(batch, *heads, seq_q, key.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_weights: Tensor) -> tuple[Tensor | None, ...]:
    call = dict(zip(_NAMES, (*ctx.saved_tensors, *ctx.options), strict=True))
    tensors = {name: call.pop(name) for name in _DIFFERENTIABLE}
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        gradients = second_order(_Composition, tensors, call, (d_weights,), create_graph)
    return tuple(gradients.get(name) for name in _NAMES)


_weights = differentiable(
    f"attention_weights({_SCHEMA}) -> Tensor",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
