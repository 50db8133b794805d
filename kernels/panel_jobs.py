"""The calls of quant_matmul with weights in panels that the compile gate makes.

int4_asym needs the most registers and is compiled for every launch, the others for some.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from llmos_fast.quantize import QuantizedWeight, empty, rounds_activations

from .epilogue import Epilogue
from .matrix import matrix
from .offline import Compiled, Job, meta
from .panel_product import panel_product
from .panel_weight import panel_weight
from .panels import Panels, panels
from .round_rows import round_rows

N, K = 4096, 4096
# rows, and whether two weights lie in turn
SOME = ((16, False), (64, True), (128, False))
EVERY = (*SOME, (32, True), (128, True))
BF16 = torch.bfloat16
CASES = (
    ("int4_asym_a16", 32, BF16, EVERY),
    ("nf4", 64, BF16, SOME),
    ("int8_a16", 128, BF16, SOME),
    ("int4_asym_a16", 32, torch.float32, ((16, True), (64, True))),
    ("int4_asym", 128, BF16, EVERY),
    ("int4_asym", 32, BF16, ((64, True), (128, False))),
    ("int8", 128, BF16, SOME),
)


def jobs(arch: int) -> Iterator[Job]:
    """Products, dense weights, and rounded activations."""
    for scheme, group_size, dtype, calls in CASES:
        for rows, gated in calls:
            yield _product_job(scheme, group_size, dtype, rows, gated)
    for scheme in ("int4_asym", "nf4"):
        weight, out = _panels(_weight(scheme, 32, N), gated=False), meta(N, K, dtype=BF16)
        dense = partial(panel_weight, weight, out)
        yield Job(f"panel_weight {scheme} bfloat16", "panel_weight_tiles", dense, lambda *_: {})
    for columns, group_size in ((K, 32), (2**15, 2**15), (2**17, 2**17)):
        rounded = partial(round_rows, meta(128, columns, dtype=BF16), group_size)
        name = f"round_rows bfloat16 {columns} in groups of {group_size}"
        # 32 warps have 64 registers a thread; no known model has such rows
        yield Job(name, "round_rows_kernel", rounded, lambda *_: {}, may_spill=columns == 2**17)


def _weight(scheme: str, group_size: int, rows: int) -> QuantizedWeight:
    return empty((rows, K), scheme, group_size, "meta")


def _panels(weight: QuantizedWeight, gated: bool) -> Panels:
    parts = weight.packed, weight.scales, weight.zero_points
    return panels(*parts, weight.scheme, weight.group_size, gated)


def _product_job(scheme: str, group_size: int, dtype: torch.dtype, rows: int, gated: bool) -> Job:
    def run() -> None:
        weight = _weight(scheme, group_size, 2 * N if gated else N)
        x, out, bias = meta(rows, K, dtype=dtype), meta(rows, N, dtype=dtype), meta(N, dtype=dtype)
        scales = None
        if rounds_activations(scheme):
            x, scales = round_rows(x, weight.group_size)
        epilogue = Epilogue(bias, bias if gated else None, residual=matrix(out))
        panel_product(x, scales, _panels(weight, gated), epilogue, out, "gelu")

    group = "" if scheme.startswith("int8") else f" groups of {group_size}"
    name = f"panel_product {scheme}{group} {str(dtype)[6:]} {rows} rows{' gated' * gated}"
    return Job(name, "panel_product_tiles", run, partial(_rules, rows))


def _rules(rows: int, arch: int, code: Compiled) -> dict[str, bool]:
    """Tensor cores do the products, Hopper's where a tile has 64 rows."""
    products = code.wgmma if arch == 90 and rows >= 64 else code.mma
    return {f"has {products} tensor core products": products > 0}
