"""Activations rounded to int8, in groups of a row that have a scale each: one pass, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import launch, wide

# numbers that a program rounds, where groups are that small
_BLOCK = 2048
# fp32 holds no halves beyond it: adding it rounds to the nearest integer, half to even
_ROUNDING = tl.constexpr(1.5 * 2**23)


@triton.jit
def round_rows_kernel(
    integers, scales, x, row_stride, column_stride, m_size, k_size, k_filled, groups, group_size,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``integers`` [m k_filled] and ``scales`` [groups m] of GROUPS groups of a row of ``x``."""
    row = wide(tl.program_id(0))
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    i = tl.arange(0, WIDTH)[None, :]
    column = group[:, None] * group_size + i
    inside = (i < group_size) & (column < k_filled)
    source = x + row * row_stride + wide(column) * column_stride
    values = tl.load(source, mask=inside & (column < k_size), other=0.0).to(tl.float32)
    # as integers: they order magnitudes alike, with NaN above all
    magnitudes = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    amax = magnitudes.to(tl.float32, bitcast=True)
    finite = amax < float("inf")
    amax = tl.maximum(tl.where(finite, amax, 0.0), 1e-30)
    scale = tl.where(finite, tl.div_rn(amax, 127.0), float("nan"))
    tl.store(scales + group * m_size + row, scale, mask=group < groups)
    scaled = tl.where(finite[:, None], values, 0.0) * tl.div_rn(127.0, amax)[:, None]
    rounded = (scaled + _ROUNDING) - _ROUNDING
    tl.store(integers + row * k_filled + column, rounded.to(tl.int8), mask=inside)


def round_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Integers and scales of ``x`` [m k], as ``ops.quant_matmul`` defines them.

    Int8[m, k filled up with 0 to a multiple of 16], and Float32[groups m].
    """
    m_size, k_size = x.shape
    k_filled = triton.cdiv(k_size, 16) * 16
    groups = triton.cdiv(k_size, group_size)
    if groups == 1:
        group_size = k_filled
    integers = torch.empty((m_size, k_filled), dtype=torch.int8, device=x.device)
    scales = torch.empty((groups, m_size), dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(group_size)
    each = min(triton.next_power_of_2(groups), max(1, _BLOCK // width))
    launch(
        round_rows_kernel,
        (m_size, triton.cdiv(groups, each)),
        x.device,
        integers=integers,
        scales=scales,
        x=x,
        row_stride=x.stride(0),
        column_stride=x.stride(1),
        m_size=m_size,
        k_size=k_size,
        k_filled=k_filled,
        groups=groups,
        group_size=group_size,
        GROUPS=each,
        WIDTH=width,
        num_warps=max(4, min(32, each * width // 1024)),
        # a product that is rounded before it is added to
        enable_fp_fusion=False,
    )
    return integers, scales
