"""attention on the GPU: a forward kernel, and deterministic kernels for its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.reference import attention as definition

from . import self_test
from .attention_arguments import Arguments
from .attention_backward import backward, empty_gradients
from .attention_forward import empty_outputs
from .attention_forward import forward as forward_kernel
from .runtime import DEVICES, refusal

# by bytes of an element: what the launch tables have an entry for
_MAX_HEAD_DIM = {2: 512, 4: 256}
SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? key_lengths, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? alibi_slopes, Tensor? sinks, str causal, int window_left, int window_right, "
    "float softcap, float dropout_p, Tensor? seed, float scale"
)


def unsupported(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: str,
    window: tuple[int, int],
    **_: object,
) -> str | None:
    """Needs tensors on a GPU (or interpreted), and head_dim up to 512 (256 for fp32)."""
    if (reason := refusal(query, key, value, bias)) is not None:
        return reason
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > (largest := _MAX_HEAD_DIM[query.dtype.itemsize]):
        return f"needs head_dim of at most {largest} for {query.dtype}, got {head_dim}"
    return self_test.refusal(query, key, value, hides=bool(causal) or max(window) >= 0)


def forward(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: str,
    key_lengths: Tensor | None,
    packed: Any,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See llmos_fast.ops.attention."""
    packed = (None, None, 0, 0) if packed is None else packed
    out, lse = attention(
        query, key, value, mask, bias, key_lengths, *packed, alibi_slopes, sinks, causal, *window,
        softcap, dropout_p, seed, scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return forward_kernel(Arguments(*arguments))


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(Arguments(*arguments))


def save_arguments(ctx: Any, arguments: tuple[Any, ...], *results: Tensor) -> None:
    """Keep them for ``saved_arguments``."""
    ctx.tensors = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
    ctx.others = [None if isinstance(x, Tensor) else x for x in arguments]
    ctx.save_for_backward(*(arguments[i] for i in ctx.tensors), *results)


def saved_arguments(ctx: Any) -> tuple[Arguments, list[Tensor]]:
    """The arguments of a registered op, and the results that were saved with them."""
    arguments, saved = list(ctx.others), list(ctx.saved_tensors)
    for i in ctx.tensors:
        arguments[i] = saved.pop(0)
    return Arguments(*arguments), saved


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_arguments(ctx, inputs, *output)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    a, (out, lse) = saved_arguments(ctx)
    needs = dict(zip(Arguments._fields, ctx.needs_input_grad, strict=True))
    gradients: dict[str, Tensor | None]
    if torch.is_grad_enabled():
        tensors, rest = definition_call(a)
        rest |= {"return_lse": True}
        gradients = second_order(definition, tensors, rest, (d_out, d_lse))
    else:
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_query, d_key, d_value, d_bias, d_sinks = _attention_backward(
            *a, out, lse, d_out, d_lse, needs["bias"], needs["sinks"]
        )
        gradients = {"query": d_query, "key": d_key, "value": d_value, "bias": d_bias}
        if a.sinks is not None:
            gradients["sinks"] = d_sinks.to(a.sinks.dtype)
    return tuple(gradients.get(name) if needs[name] else None for name in Arguments._fields)


def definition_call(a: Arguments) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """(differentiable tensors, other arguments) of the definition's forward."""
    from llmos_fast.ops.attention import PackedLengths

    call = a._asdict()
    packed = PackedLengths(*(call.pop(name) for name in PackedLengths._fields))
    window = (call.pop("window_left"), call.pop("window_right"))
    tensors = {name: call.pop(name) for name in ("query", "key", "value", "bias", "sinks")}
    return tensors, call | {"packed": packed if a.packed else None, "window": window}


def _backward_kernels(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = len(Arguments._fields)
    return backward(Arguments(*arguments[:count]), *arguments[count:])


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = len(Arguments._fields)
    a, (_, lse, _, _, need_bias, need_sinks) = Arguments(*arguments[:count]), arguments[count:]
    return (
        *empty_gradients(a),
        torch.empty_like(a.bias, memory_format=torch.contiguous_format)
        if need_bias and a.bias is not None
        else lse.new_empty(0),
        lse.new_empty(a.heads[0] if need_sinks else 0),
    )


attention = differentiable(
    f"attention_triton({SCHEMA}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
_attention_backward = register(
    f"attention_triton_backward({SCHEMA}, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, "
    "bool need_bias, bool need_sinks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernels,
    _backward_fake,
    DEVICES,
)
