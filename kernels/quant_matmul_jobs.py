"""The calls of quant_matmul that the compile gate makes: fp8 weights, which sm_80 does not know."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .ffn_jobs import SIZES, launches, product_rule, tiles
from .launch import forced
from .offline import Job, meta
from .product_launch import ProductLaunch
from .quant_matmul import fp8_product

DTYPES = (torch.bfloat16, torch.float32)


def jobs(arch: int) -> Iterator[Job]:
    """All tilings, and products of a few rows."""
    if arch < 90:
        return
    for dtype in DTYPES:
        for launch, aligned in launches("product", arch, dtype, 1):
            yield _job(4096, launch, aligned, dtype)
        for rows in (16, 64):
            yield _job(rows, None, True, dtype)


def _job(rows: int, launch: ProductLaunch | None, aligned: bool, dtype: torch.dtype) -> Job:
    _, features, hidden = SIZES[aligned]

    def run() -> None:
        x, packed = meta(rows, features, dtype=dtype), meta(hidden, features, dtype=torch.uint8)
        scales, bias = meta(hidden, dtype=torch.float32), meta(hidden, dtype=dtype)
        with forced(**({} if launch is None else {"product": launch})):
            fp8_product(x, packed, scales, bias, None, "gelu")

    how = f"{rows} rows" if launch is None else tiles(launch)
    name = f"fp8_product {str(dtype)[6:]} {how}{'' if aligned else ' unaligned'}"
    kernel = "small_product_tiles" if launch is None else "product_tiles"
    return Job(name, kernel, run, product_rule)
