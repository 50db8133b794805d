"""Dropout with a residual on the GPU, and how kernels go over the rows of a tensor.

The gradient of ``x`` is dropped by the same bits: the op, which casts on the way, is its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.library import differentiable

from .launch import unless_forced
from .philox import dropout_numbers, kept
from .runtime import DEVICES, architecture, contiguous, launch, refusal, wide

# elements of a tile for each of its warps: 16 in a thread, which are loaded at once
TILE_PER_WARP = 512
# adjacent columns of a tile: fewer would not fill the 32 bytes that memory moves at least
MIN_BLOCK = 16
_MAX_BLOCK = 1024


def row_count(x: Tensor) -> int:
    """Rows of Float[... columns]."""
    return x.numel() // max(x.shape[-1], 1)


def total_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Of residual + dropout(x)."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


@dataclass(frozen=True)
class RowsLaunch:
    """How rows are cut into tiles [BLOCK_ROWS, BLOCK]; ``num_warps``: of a program."""

    BLOCK_ROWS: int
    BLOCK: int
    num_warps: int


@triton.jit
def load_rows(x, r, c, rows, COLUMNS: tl.constexpr):
    """Elements (r, c) of ``x`` [rows COLUMNS] in fp32, zeros outside of it.

    ``r`` is Int64[R, 1] and ``c`` Int32[1, C].
    """
    inside = (r < rows) & (c < COLUMNS)
    return tl.load(x + r * COLUMNS + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, r, c, rows, COLUMNS: tl.constexpr):
    """Write elements (r, c), rounded to the dtype of ``x``."""
    inside = (r < rows) & (c < COLUMNS)
    tl.store(x + r * COLUMNS + c, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def drop(value, dropout, r, first_column, BLOCK: tl.constexpr):
    """Dropout of a tile whose columns start at ``first_column``; None drops nothing."""
    if dropout is not None:
        keep = kept(dropout, 0, r, first_column, BLOCK)
        value = tl.where(keep, value * dropout.keep_scale, 0.0)
    return value


@triton.jit
def dropout_sum(
    x, residual, dropout, r, first_column, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of residual + dropout(x) in fp32, zeros outside."""
    c = first_column + tl.arange(0, BLOCK)[None, :]
    value = load_rows(x, r, c, rows, COLUMNS)
    if residual is None:
        value = drop(value, dropout, r, first_column, BLOCK)
    else:
        # loaded before the bits are drawn: memory works meanwhile
        other = load_rows(residual, r, c, rows, COLUMNS)
        value = other + drop(value, dropout, r, first_column, BLOCK)
    return value


@triton.jit
def dropout(
    x, residual, out, dropout_numbers, rows,
    COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one tile."""
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    first_row = wide(tl.program_id(0) // blocks) * BLOCK_ROWS
    first_column = tl.program_id(0) % blocks * BLOCK
    r = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    total = dropout_sum(x, residual, dropout_numbers, r, first_column, rows, COLUMNS, BLOCK)
    c = first_column + tl.arange(0, BLOCK)[None, :]
    store_rows(out, total, r, c, rows, COLUMNS)


def choose_launch(arch: int, columns: int) -> RowsLaunch:
    """The launch for rows of ``columns`` elements."""
    block = min(max(MIN_BLOCK, int(triton.next_power_of_2(columns))), _MAX_BLOCK)
    if arch == 0:
        return RowsLaunch(8, min(block, 64), num_warps=4)
    return RowsLaunch(4 * TILE_PER_WARP // block, block, num_warps=4)


def unsupported(*, x: Tensor, residual: Tensor | None, **_: object) -> str | None:
    """Needs tensors on a GPU (or interpreted), in bf16, fp16 or fp32."""
    return refusal(x, residual)


def forward(*, x: Tensor, residual: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """See llmos_fast.ops.dropout."""
    if seed is None:
        if residual is None:
            return x
        if x.dtype == residual.dtype:
            return residual + x
    dtype = total_dtype(x, residual)
    return dropout_as(x, residual, dropout_p, seed, dtype)  # type: ignore[no-any-return]


def gradients(
    d_total: Tensor,
    p: float,
    seed: Tensor | None,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(d_x, d_residual) of residual + dropout(x), differentiable; None where the dtype is None."""
    return _dropped(d_total, p, seed, x_dtype), _dropped(d_total, 0.0, None, residual_dtype)


def _dropped(x: Tensor, p: float, seed: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """dropout(x) in another dtype; ``x`` itself where nothing changes."""
    if dtype is None or (seed is None and dtype == x.dtype):
        return None if dtype is None else x
    return dropout_as(x, None, p, seed, dtype)  # type: ignore[no-any-return]


def launch_forward(
    x: Tensor, residual: Tensor | None, p: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute residual + dropout(x) in ``dtype``."""
    out = _forward_fake(x, residual, p, seed, dtype)
    if out.numel() == 0:
        return out
    rows, columns = row_count(x), x.shape[-1]
    config = unless_forced("dropout", choose_launch(architecture(x.device), columns))
    launch(
        dropout,
        (triton.cdiv(rows, config.BLOCK_ROWS) * triton.cdiv(columns, config.BLOCK),),
        x.device,
        x=x.contiguous(),
        residual=contiguous(residual),
        out=out,
        dropout_numbers=dropout_numbers(seed, p),
        rows=rows,
        COLUMNS=columns,
        **asdict(config),
    )
    return out


def _forward_fake(
    x: Tensor, residual: Tensor | None, p: float, seed: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, ctx.p, seed, _ = inputs
    ctx.dtypes = needed_dtypes(ctx, x, residual)
    ctx.save_for_backward(seed)


def _backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return (*gradients(d_total, ctx.p, seed, *ctx.dtypes), None, None, None)


def needed_dtypes(ctx: Any, *inputs: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """The dtype of each gradient that autograd asks for, from the first input on."""
    pairs = zip(inputs, ctx.needs_input_grad, strict=False)
    return tuple(t.dtype if t is not None and needed else None for t, needed in pairs)


# residual + dropout(x), rounded to any dtype
dropout_as = differentiable(
    "dropout_triton(Tensor x, Tensor? residual, float dropout_p, Tensor? seed, ScalarType dtype) "
    "-> Tensor",
    launch_forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
