"""rotary on the CPU: csrc/cpu/rotary.inl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable
from llmos_fast.native.common import _C, dtype_code, refusal


def unsupported(*, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, **_: object) -> str | None:
    """Needs CPU tensors in fp32 or bf16; the angles get no gradient here."""
    reason = refusal(query, key, cos, sin)
    if reason is None and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "needs angles without gradient, got cos or sin with requires_grad"
    return reason


def forward(
    *,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    positions: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.rotary."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.float(), sin.float()
    turned = tuple(_rotary(x, cos, sin, interleaved, False) for x in (query, key))
    return (query.copy_(turned[0]), key.copy_(turned[1])) if inplace else (turned[0], turned[1])


def _forward_cpu(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, seq, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    half = cos.shape[-1]
    _C.rotary(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        batch,
        heads,
        seq,
        head_dim,
        half,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        seq * half if cos.dim() == 3 else 0,
        dtype_code(x.dtype),
        interleaved,
        -1.0 if back else 1.0,
    )
    return out


def _forward_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None, None]:
    cos, sin = ctx.saved_tensors
    # a rotation's gradient is the rotation back
    return _rotary(d_out, cos, sin, ctx.interleaved, not ctx.back), None, None, None, None


_rotary = differentiable(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool back) -> Tensor",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
