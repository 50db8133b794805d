"""Names of the weight formats, the levels their codes stand for, and the scales they store."""

from __future__ import annotations

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "int4_asym", "nf4", "fp8", "fp8_block")
FOUR_BIT = ("int4", "int4_asym", "nf4")
FP8 = ("fp8", "fp8_block")
# rows and columns of a weight that share a scale in fp8_block
FP8_BLOCK = 128
FP8_MAX = 448.0
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def scale_dtype(name: str) -> torch.dtype:
    """Of the stored scales: 16 bits where a few dozen weights share one, else fp32."""
    return torch.bfloat16 if name in FOUR_BIT else torch.float32


def round_scales(scales: Tensor, name: str) -> Tensor:
    """fp32 ``scales`` as they will be stored, rounded away from 0: no level gets out of reach."""
    if scale_dtype(name) == torch.float32:
        return scales
    largest = torch.finfo(torch.bfloat16).max
    bits = (scales.view(torch.int32) + 0xFFFF) & -0x10000
    return bits.view(torch.float32).clamp(-largest, largest)


def levels_of_codes(name: str, codes: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``codes`` (uint8) as levels of format ``name``; ``zeros`` broadcasts to them (int4_asym)."""
    if name in FP8:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    if name == "nf4":
        table = torch.tensor(NF4_LEVELS, device=codes.device).to(dtype)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)
    if name == "int4_asym":
        assert zeros is not None
        return codes.to(dtype) - zeros
    return codes.to(dtype) - (128 if name == "int8" else 8)
