"""add_norm on the GPU: dropout, residual sum and normalisation in one pass over memory.

A program holds whole rows in registers, several where they are narrow, and computes the variance
from what remains after the mean is subtracted. Wider rows pass twice, by blocks whose moments are
combined (Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances",
1979); the second time they come from the cache.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.reference import add_norm as definition

from .add_norm_backward import backward, empty_gradients, load_weight
from .dropout import (
    MIN_BLOCK,
    TILE_PER_WARP,
    RowsLaunch,
    dropout_sum,
    gradients,
    load_rows,
    needed_dtypes,
    row_count,
    store_rows,
    total_dtype,
)
from .launch import unless_forced
from .philox import dropout_numbers
from .runtime import DEVICES, architecture, contiguous, launch, refusal, wide

# wider rows do not fit registers; x and residual of two dtypes need more of them
_MAX_BLOCK = 32768
_MAX_BLOCK_MIXED = 16384
_WIDE_BLOCK = 8192


@triton.jit
def add_norm_forward(
    x, residual, weight, bias, norm, total, mean, rstd, dropout, rows, eps,
    FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_ROWS rows that fit a block; ``total`` is None where it is x."""
    r = wide(tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    t = dropout_sum(x, residual, dropout, r, 0, rows, FEATURES, BLOCK)
    if total is not None:
        t = _store_total(t, total, r, c, rows, FEATURES)
    if mean is not None:
        m = tl.sum(t, 1, keep_dims=True) / FEATURES
        tl.store(mean + r, m, mask=r < rows)
        t = tl.where(c < FEATURES, t - m, 0.0)
    scale = tl.rsqrt(tl.sum(t * t, 1, keep_dims=True) / FEATURES + eps)
    tl.store(rstd + r, scale, mask=r < rows)
    _store_norm(t * scale, weight, bias, norm, r, c, rows, FEATURES)


@triton.jit
def add_norm_forward_wide(
    x, residual, weight, bias, norm, total, mean, rstd, dropout, rows, eps,
    FEATURES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Likewise for rows of several blocks."""
    r = wide(tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    m = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    for first in range(0, FEATURES, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        t = dropout_sum(x, residual, dropout, r, first, rows, FEATURES, BLOCK)
        if total is not None:
            t = _store_total(t, total, r, c, rows, FEATURES)
        if mean is not None:
            size = tl.minimum(FEATURES - first, BLOCK).to(tl.float32)
            share = size / (first + size)
            block_m = tl.sum(t, 1, keep_dims=True) / size
            t = tl.where(c < FEATURES, t - block_m, 0.0)
            step = block_m - m
            squares += step * step * (first * share)
            m += step * share
        squares += tl.sum(t * t, 1, keep_dims=True)
    scale = tl.rsqrt(squares / FEATURES + eps)
    if mean is not None:
        tl.store(mean + r, m, mask=r < rows)
    tl.store(rstd + r, scale, mask=r < rows)
    tl.debug_barrier()  # total is read by other threads than wrote it
    for first in range(0, FEATURES, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        if total is None:
            t = load_rows(x, r, c, rows, FEATURES)
        else:
            t = load_rows(total, r, c, rows, FEATURES)
        if mean is not None:
            t -= m
        _store_norm(t * scale, weight, bias, norm, r, c, rows, FEATURES)


@triton.jit
def _store_total(t, total, r, c, rows, FEATURES: tl.constexpr):
    """Write a tile of the total; return it as it was written."""
    store_rows(total, t, r, c, rows, FEATURES)
    return t.to(total.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_norm(n, weight, bias, norm, r, c, rows, FEATURES: tl.constexpr):
    if weight is not None:
        n *= load_weight(weight, c, FEATURES)
    if bias is not None:
        n += load_weight(bias, c, FEATURES)
    store_rows(norm, n, r, c, rows, FEATURES)


def choose_forward(arch: int, features: int, mixed: bool) -> RowsLaunch:
    """The launch for rows of ``features`` elements, which are wide where BLOCK is less.

    ``mixed``: x and residual have two dtypes.
    """
    block = max(MIN_BLOCK, int(triton.next_power_of_2(features)))
    if arch == 0:
        return RowsLaunch(4, min(block, 64), num_warps=4)
    if block > (_MAX_BLOCK_MIXED if mixed else _MAX_BLOCK):
        block = _WIDE_BLOCK
    warps = min(max(4, block // TILE_PER_WARP), 16)
    return RowsLaunch(max(1, warps * TILE_PER_WARP // block), block, warps)


def unsupported(
    *,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    **_: object,
) -> str | None:
    """Needs tensors on a GPU (or interpreted), in bf16, fp16 or fp32."""
    return refusal(x, residual, weight, bias)


def forward(
    *,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.add_norm."""
    norm, total, _, _ = _add_norm(x, residual, weight, bias, kind == "rms", eps, dropout_p, seed)
    return norm, x if _total_is_x(residual, seed) else total


def _total_is_x(residual: Tensor | None, seed: Tensor | None) -> bool:
    return residual is None and seed is None


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(norm, total, mean, rstd), as ``_empty_results``."""
    results = _empty_results(x, residual, rms, seed)
    norm, total, mean, rstd = results
    if norm.numel() == 0:
        return results
    rows, features = row_count(x), x.shape[-1]
    mixed = residual is not None and x.dtype != residual.dtype
    chosen = choose_forward(architecture(x.device), features, mixed)
    config = unless_forced("add_norm_forward", chosen)
    launch(
        add_norm_forward if features <= config.BLOCK else add_norm_forward_wide,
        (triton.cdiv(rows, config.BLOCK_ROWS),),
        x.device,
        x=x.contiguous(),
        residual=contiguous(residual),
        weight=contiguous(weight),
        bias=contiguous(bias),
        norm=norm,
        total=None if _total_is_x(residual, seed) else total,
        mean=None if rms else mean,
        rstd=rstd,
        dropout=dropout_numbers(seed, p),
        rows=rows,
        eps=eps,
        FEATURES=features,
        **asdict(config),
    )
    return results


def _empty_results(
    x: Tensor, residual: Tensor | None, rms: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(norm, total, mean, rstd); total is empty where it is x, mean where it is not needed."""
    dtype = total_dtype(x, residual)
    rows = row_count(x)
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((0,) if _total_is_x(residual, seed) else x.shape, dtype=dtype),
        x.new_empty(0 if rms else rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(x, residual, rms, seed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, ctx.rms, ctx.eps, ctx.p, seed = inputs
    _, total, mean, rstd = output
    total = x if _total_is_x(residual, seed) else total
    ctx.dtypes = needed_dtypes(ctx, x, residual, weight, bias)
    ctx.save_for_backward(weight, bias, seed, total, mean, rstd)


def _backward(
    ctx: Any, d_norm: Tensor | None, d_total: Tensor | None, _mean: None, _rstd: None
) -> tuple[Tensor | None, ...]:
    weight, _, seed, total, mean, rstd = ctx.saved_tensors
    found: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():
        found = _differentiable_backward(ctx, d_norm, d_total)
    elif d_norm is None:
        assert d_total is not None
        found = (*gradients(d_total, ctx.p, seed, *ctx.dtypes[:2]), None, None)
    else:
        dtypes = list(ctx.dtypes)
        # one tensor serves both where neither dropout nor rounding tells them apart
        shared = seed is None and dtypes[0] is not None and dtypes[0] == dtypes[1]
        if shared:
            dtypes[1] = None
        call = (d_norm, d_total, total, weight, mean, rstd, ctx.rms, ctx.p, seed)
        results = _add_norm_backward(*call, *dtypes)
        found = tuple(
            None if dtype is None else result for dtype, result in zip(dtypes, results, strict=True)
        )
        if shared:
            found = (found[0], *found[:1], *found[2:])
    return (*found, None, None, None, None)


def _differentiable_backward(
    ctx: Any, d_norm: Tensor | None, d_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of gradients need no input but ``total``, which autograd knows."""
    weight, bias, seed, total, _, _ = ctx.saved_tensors
    found = second_order(
        definition,
        {"x": total, "weight": weight, "bias": bias},
        {
            "residual": None,
            "kind": "rms" if ctx.rms else "layer",
            "eps": ctx.eps,
            "dropout_p": 0.0,
            "seed": None,
        },
        (d_norm,),
    )
    parts = [g for g in (found["x"], d_total) if g is not None]
    d_full = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    d_x, d_residual = gradients(d_full, ctx.p, seed, *ctx.dtypes[:2])
    return d_x, d_residual, found["weight"], found["bias"]


def _backward_fake(
    d_norm: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    p: float,
    seed: Tensor | None,
    *dtypes: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(total, *dtypes)


_add_norm = differentiable(
    "add_norm_triton(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, "
    "float eps, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    launch_forward,
    _forward_fake,
    _setup_context,
    _backward,
    DEVICES,
)
_add_norm_backward = register(
    "add_norm_triton_backward(Tensor d_norm, Tensor? d_total, Tensor total, Tensor? weight, "
    "Tensor mean, Tensor rstd, bool rms, float dropout_p, Tensor? seed, ScalarType? x_dtype, "
    "ScalarType? residual_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    backward,
    _backward_fake,
    DEVICES,
)
