"""The calls of quant_matmul in fp8 that the compile gate makes; sm_80 does not know fp8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product as combinations

import torch

from llmos_fast.quantize import shapes

from .ffn_jobs import SIZES, launch_rules, launches, product_rule, tiles
from .fp8_matmul import fp8_matmul
from .fp8_rounding import round_to_fp8
from .launch import forced
from .offline import Compiled, Job, meta
from .product_launch import ProductLaunch

FP8 = torch.float8_e4m3fn


def jobs(arch: int) -> Iterator[Job]:
    """Both kinds of scales: all tilings, products of a few rows, and the rounding before them."""
    if arch < 90:
        return
    for blocks, gated in combinations((False, True), (False, True)):
        for launch, aligned in launches("product", arch, FP8, 1 + gated):
            yield _product_job(launch, aligned, blocks, gated)
        for rows, aligned in combinations((16, 32, 64), (True, False)):
            yield _small_job(rows, aligned, blocks, gated)
    for dtype, group_size in combinations((torch.bfloat16, torch.float32), (128, 1024, 4096)):
        x = meta(4096, group_size, dtype=dtype)
        name = f"round_groups {str(dtype)[6:]} {group_size}"
        yield Job(name, "round_groups", partial(round_to_fp8, x, group_size), lambda *_: {})


def _product_job(launch: ProductLaunch, aligned: bool, blocks: bool, gated: bool) -> Job:
    def run() -> None:
        with forced(product=launch):
            _multiply(SIZES[aligned][0], aligned, blocks, gated)

    def rules(arch: int, code: Compiled) -> dict[str, bool]:
        return sums_rule(code) | launch_rules(launch, FP8, arch, code)

    name = f"fp8_matmul {tiles(launch)}{_features(aligned, blocks, gated)}"
    return Job(name, "product_tiles", run, rules)


def _small_job(rows: int, aligned: bool, blocks: bool, gated: bool) -> Job:
    run = partial(_multiply, rows, aligned, blocks, gated)

    def rules(arch: int, code: Compiled) -> dict[str, bool]:
        return sums_rule(code) | product_rule(arch, code)

    name = f"fp8_matmul {rows} rows{_features(aligned, blocks, gated)}"
    return Job(name, "small_product_tiles", run, rules)


def _features(aligned: bool, blocks: bool, gated: bool) -> str:
    return " blocks" * blocks + " gated" * gated + " unaligned" * (not aligned)


def sums_rule(code: Compiled) -> dict[str, bool]:
    """A sum of wgmma in fp8 has 128 products at most, 32 of an instruction."""
    holds = code.wgmma * 32 <= code.sums * 128
    return {f"has {code.wgmma} wgmma in {code.sums} sums": holds}


def _multiply(rows: int, aligned: bool, blocks: bool, gated: bool) -> None:
    _, k, columns = SIZES[aligned]
    n = 2 * columns if gated else columns
    x, packed = meta(rows, k, dtype=torch.bfloat16), meta(n, k, dtype=torch.uint8)
    scheme, group_size = ("fp8_block", 128) if blocks else ("fp8", k)
    scales = meta(*shapes(scheme, (n, k), group_size)["scales"], dtype=torch.float32)
    bias, residual = meta(n, dtype=x.dtype), meta(rows, columns, dtype=x.dtype)
    fp8_matmul(x, packed, scales, bias, residual, blocks, "gelu", gated)
