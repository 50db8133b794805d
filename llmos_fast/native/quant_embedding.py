"""quant_embedding on the CPU: csrc/cpu/quant_rows.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import refusal_of_transforms, register
from llmos_fast.native.common import _C, FORMAT_CODES, address, contiguous, dtype_code
from llmos_fast.quantize import QuantizedWeight


def unsupported(*, ids: Tensor, qweight: QuantizedWeight, dtype: torch.dtype) -> str | None:
    """Needs CPU tensors, scales of rows or their groups, and a result in fp32 or bf16."""
    if (reason := refusal_of_transforms()) is not None:
        return reason
    if not ids.is_cpu:
        return f"needs CPU tensors, got {ids.device}"
    if qweight.scheme not in FORMAT_CODES:
        return f"reads scales of rows and their groups, got {qweight.scheme}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"needs float32 or bfloat16, got {dtype}"
    return None


def forward(*, ids: Tensor, qweight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """See llmos_fast.ops.quant_embedding."""
    w = qweight
    rest = (w.scheme, w.group_size, *w.shape, dtype)
    return _lookup(ids, w.packed, w.scales, w.zero_points, *rest)  # type: ignore[no-any-return]


def _lookup_cpu(
    ids: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    ids, packed, scales = ids.contiguous(), packed.contiguous(), scales.contiguous()
    zero_points = contiguous(zero_points)
    out = torch.empty((*ids.shape, columns), dtype=dtype)
    _C.quant_rows(
        packed.data_ptr(),
        scales.data_ptr(),
        address(zero_points),
        ids.data_ptr(),
        ids.dtype == torch.int64,
        ids.numel(),
        out.data_ptr(),
        rows,
        columns,
        group_size,
        FORMAT_CODES[scheme],
        dtype_code(dtype),
    )
    return out


def _lookup_fake(ids: Tensor, *rest: Any) -> Tensor:
    *_, columns, dtype = rest
    return ids.new_empty((*ids.shape, columns), dtype=dtype)


_lookup = register(
    "quant_embedding(Tensor ids, Tensor packed, Tensor scales, Tensor? zero_points, str scheme, "
    "int group_size, SymInt rows, SymInt columns, ScalarType dtype) -> Tensor",
    _lookup_cpu,
    _lookup_fake,
)
