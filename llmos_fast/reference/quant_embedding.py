"""The definition of the lookup in a quantized table."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.quantize import QuantizedWeight


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(*, ids: Tensor, qweight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """See llmos_fast.ops.quant_embedding."""
    rows = ids.reshape(-1).long()
    if rows.numel():
        _check_range(rows, qweight.shape[0])
    return qweight.rows(rows, dtype).view(*ids.shape, qweight.shape[1])


def _check_range(ids: Tensor, end: int) -> None:
    low, high = ids.aminmax()
    rule = f"be in [0, {end})"
    if ids.is_cpu and not torch.compiler.is_compiling():
        for value in (int(low), int(high)):
            if not 0 <= value < end:
                raise IndexError(f"quant_embedding: ids must {rule}, got {value}")
        return
    torch._assert_async((low >= 0) & (high < end), f"quant_embedding: ids must {rule}")
