"""rotary on the CPU: csrc/cpu/rotary.inl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable
from llmos_fast.native.common import _C, address, contiguous, dtype_code, refusal


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
    cos, sin = cos.float(), sin.float()
    turned = tuple(_rotary(x, cos, sin, positions, interleaved, False) for x in (query, key))
    return (query.copy_(turned[0]), key.copy_(turned[1])) if inplace else (turned[0], turned[1])


def _forward_cpu(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, back: bool
) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = contiguous(positions)
    per_batch = (cos.dim() == 3) if positions is None else (positions.dim() == 2)
    batch, heads, seq, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    half = cos.shape[-1]
    _C.rotary(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        address(positions),
        positions is not None and positions.dtype == torch.int64,
        out.data_ptr(),
        batch,
        heads,
        seq,
        head_dim,
        half,
        cos.shape[-2],
        x.stride(0),
        x.stride(1),
        x.stride(2),
        seq if per_batch else 0,
        dtype_code(x.dtype),
        interleaved,
        -1.0 if back else 1.0,
    )
    return out


def _forward_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    # a rotation's gradient is the rotation back
    return _rotary(d_out, *ctx.saved_tensors, ctx.interleaved, not ctx.back), *[None] * 5


_rotary = differentiable(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool back) "
    "-> Tensor",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
