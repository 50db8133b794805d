"""rotary on the GPU: query and key in one launch, angles loaded once for a block of heads.

A program takes BLOCK_T tokens of BLOCK_H heads, all of the query or all of the key. The gradient is
the rotation back, by the same kernel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.library import differentiable, register
from llmos_fast.ops import check

from .attention_arguments import rows
from .launch import unless_forced
from .runtime import DEVICES, architecture, launch, refusal, wide


@dataclass(frozen=True)
class RotaryLaunch:
    """Tokens and heads of a program; ``num_warps``: of a program."""

    BLOCK_T: int
    BLOCK_H: int
    num_warps: int


@triton.jit
def rotary(
    query, key, query_out, key_out, cos, sin, positions, batch_stride_positions,
    tokens, seq, heads_q, heads_k, table_rows,
    HALF: tl.constexpr, PASSED: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_PASSED: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One block of heads of the query, or of the key; None is a tensor that is not asked for.

    cos and sin are contiguous [table_rows, HALF]: a row for each position, or for each token of the
    batch where PER_TOKEN.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = token < tokens
    batch = token // seq
    position = token % seq
    row = position
    if PER_TOKEN:
        row = token
    if positions is not None:
        index = positions + wide(batch) * batch_stride_positions + position
        row = tl.load(index, mask=exists, other=0)
        # what is not in the table must not be read
        row = tl.minimum(tl.maximum(row, 0), table_rows - 1)
    pair = tl.arange(0, BLOCK_HALF)
    inside = exists[:, None] & (pair < HALF)[None, :]
    angle = wide(row)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    block = tl.program_id(1)
    blocks_q = 0
    if query is not None:
        blocks_q = tl.cdiv(heads_q, BLOCK_H)
        if block < blocks_q:
            _rotate(query, query_out, c, s, batch, position, exists, block * BLOCK_H, heads_q,
                    HALF, PASSED, BLOCK_HALF, BLOCK_PASSED, INTERLEAVED, BLOCK_H)  # fmt: skip
    if key is not None:  # noqa: SIM102 - the first is decided when the kernel is compiled
        if block >= blocks_q:
            _rotate(key, key_out, c, s, batch, position, exists, (block - blocks_q) * BLOCK_H,
                    heads_k, HALF, PASSED, BLOCK_HALF, BLOCK_PASSED, INTERLEAVED,
                    BLOCK_H)  # fmt: skip


@triton.jit
def _rotate(
    x, out, c, s, batch, position, exists, first_head, heads,
    HALF: tl.constexpr, PASSED: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_PASSED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of the tokens; ``out`` may be ``x``."""
    source = wide(batch) * x.batch_stride + wide(position) * x.row_stride
    target = wide(batch) * out.batch_stride + wide(position) * out.row_stride
    for step in tl.static_range(BLOCK_H):
        head = first_head + step
        if head < heads:
            x_row = x.ptr + (source + wide(head) * x.head_stride)[:, None]
            out_row = out.ptr + (target + wide(head) * out.head_stride)[:, None]
            if INTERLEAVED:
                _rotate_neighbours(x_row, out_row, x, out, c, s, exists, HALF, BLOCK_HALF)
            else:
                _rotate_halves(x_row, out_row, x, out, c, s, exists, HALF, BLOCK_HALF)
            if PASSED > 0:
                column = 2 * HALF + tl.arange(0, BLOCK_PASSED)[None, :]
                inside = exists[:, None] & (column < 2 * HALF + PASSED)
                rest = tl.load(x_row + column * x.column_stride, mask=inside, other=0.0)
                tl.store(out_row + column * out.column_stride, rest, mask=inside)


@triton.jit
def _rotate_neighbours(
    x_row, out_row, x, out, c, s, exists, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Pairs (2 i, 2 i + 1), loaded as they lie and taken apart in registers."""
    column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
    inside = exists[:, None] & (column < 2 * HALF)
    both = tl.load(x_row + column * x.column_stride, mask=inside, other=0.0)
    a, b = tl.split(tl.reshape(both.to(tl.float32), [both.shape[0], BLOCK_HALF, 2]))
    turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), both.shape)
    turned = turned.to(out.ptr.dtype.element_ty)
    tl.store(out_row + column * out.column_stride, turned, mask=inside)


@triton.jit
def _rotate_halves(
    x_row, out_row, x, out, c, s, exists, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Pairs (i, i + HALF)."""
    first = tl.arange(0, BLOCK_HALF)[None, :]
    second = first + HALF
    inside = exists[:, None] & (first < HALF)
    a = tl.load(x_row + first * x.column_stride, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_row + second * x.column_stride, mask=inside, other=0.0).to(tl.float32)
    left = (a * c - b * s).to(out.ptr.dtype.element_ty)
    right = (b * c + a * s).to(out.ptr.dtype.element_ty)
    tl.store(out_row + first * out.column_stride, left, mask=inside)
    tl.store(out_row + second * out.column_stride, right, mask=inside)


def choose_launch(arch: int, half: int) -> RotaryLaunch:
    """The launch for ``half`` pairs of features: about 512 pairs of a head at a time."""
    if arch == 0:
        return RotaryLaunch(4, 2, num_warps=4)
    tokens = max(4, min(32, 512 // max(8, int(triton.next_power_of_2(half)))))
    return RotaryLaunch(tokens, 4, num_warps=4)


def unsupported(
    *,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    **_: object,
) -> str | None:
    """Needs CUDA tensors in bf16, fp16 or fp32; the angles get no gradient here."""
    reason = refusal(query, key, cos, sin, positions)
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
        check.rows_exist("rotary", "positions", positions, cos.shape[0], "cos")
    if inplace:
        _rotary_inplace(query, key, cos, sin, positions, interleaved)
        return query, key
    return _rotary(query, key, cos, sin, positions, interleaved, False)  # type: ignore[no-any-return]


def rotate(
    query: Tensor | None,
    key: Tensor | None,
    query_out: Tensor,
    key_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    back: bool,
) -> None:
    """Write the rotated tensors; None has no output either."""
    given = [x for x in (query, key) if x is not None]
    if not given or all(x.numel() == 0 for x in given):
        return
    batch, _, seq, head_dim = given[0].shape
    half = cos.shape[-1]
    config = unless_forced("rotary", choose_launch(architecture(cos.device), half))
    heads = [0 if x is None else x.shape[1] for x in (query, key)]
    blocks = sum(triton.cdiv(h, config.BLOCK_H) for h in heads)
    passed = head_dim - 2 * half
    if positions is not None:
        positions = positions.contiguous()
    launch(
        rotary,
        (triton.cdiv(batch * seq, config.BLOCK_T), blocks),
        cos.device,
        query=None if query is None else rows(query),
        key=None if key is None else rows(key),
        query_out=None if query is None else rows(query_out),
        key_out=None if key is None else rows(key_out),
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        positions=positions,
        batch_stride_positions=seq if positions is not None and positions.dim() == 2 else 0,
        tokens=batch * seq,
        seq=seq,
        heads_q=heads[0],
        heads_k=heads[1],
        table_rows=cos.shape[:-1].numel(),
        HALF=half,
        PASSED=passed,
        BLOCK_HALF=max(1, int(triton.next_power_of_2(half))),
        BLOCK_PASSED=max(1, int(triton.next_power_of_2(passed))),
        INTERLEAVED=interleaved,
        BACK=back,
        PER_TOKEN=cos.dim() == 3,
        **asdict(config),
    )


def _forward(
    query: Tensor | None,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    back: bool,
) -> tuple[Tensor, Tensor]:
    query_out, key_out = _empty(query, cos), _empty(key, cos)
    rotate(query, key, query_out, key_out, cos, sin, positions, interleaved, back)
    return query_out, key_out


def _empty(x: Tensor | None, cos: Tensor) -> Tensor:
    """Contiguous, of the shape of ``x``; nothing for None."""
    return cos.new_empty(0) if x is None else x.new_empty(x.shape)


def _forward_fake(
    query: Tensor | None,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    back: bool,
) -> tuple[Tensor, Tensor]:
    return _empty(query, cos), _empty(key, cos)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, d_query: Tensor | None, d_key: Tensor | None) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    given = (d_query, d_key)
    found = _rotary(*given, cos, sin, positions, ctx.interleaved, not ctx.back)
    gradients = (None if d is None else g for d, g in zip(given, found, strict=True))
    return (*gradients, None, None, None, None, None)


def _inplace(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    rotate(query, key, query, key, cos, sin, positions, interleaved, False)
    # autograd must see that what it may have saved has changed
    torch.autograd.graph.increment_version((query, key))


def _inplace_fake(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
) -> None:
    return None


_rotary = differentiable(
    "rotary_triton(Tensor? query, Tensor? key, Tensor cos, Tensor sin, Tensor? positions, "
    "bool interleaved, bool back) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
_rotary_inplace = register(
    "rotary_triton_(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin, Tensor? positions, "
    "bool interleaved) -> ()",
    _inplace,
    _inplace_fake,
    DEVICES,
)
