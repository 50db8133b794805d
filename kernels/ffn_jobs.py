"""The calls of ffn and gated_ffn that the compile gate makes, for every launch of their tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product as combinations

import torch
from torch import Tensor

from .column_sum import sum_rows
from .epilogue import Epilogue
from .ffn_backward import Activated, hidden_gradients
from .launch import forced
from .matrix import matrix
from .offline import Compiled, Job, meta
from .philox import Dropout, dropout_numbers
from .product import product
from .product_launch import TABLE, UNALIGNED, ProductLaunch
from .small_product import small_product

DTYPES = (torch.bfloat16, torch.float32)
# rows, columns of x, hidden columns; odd ones cannot be loaded 16 bytes at a time
SIZES = {True: (4096, 1024, 4096), False: (4096, 1021, 4093)}


def jobs(arch: int) -> Iterator[Job]:
    """Both kernels in all tilings, products of a few rows, and sums for biases."""
    for dtype, gated, full in combinations(DTYPES, (False, True), (False, True)):
        for launch, aligned in launches("product", arch, dtype, 1 + gated):
            yield _product_job(launch, aligned, dtype, gated, full)
        for rows, aligned in combinations((16, 32, 64), (True, False)):
            if full:
                yield _small_job(rows, aligned, dtype, gated)
        for again in (False, True):
            for launch, aligned in launches(
                "ffn_backward", arch, dtype, 1 + again + (again and gated)
            ):
                yield _backward_job(launch, aligned, dtype, gated, again, full)
    for dtype in DTYPES:
        x = meta(4096, 1024, dtype=dtype)
        run = partial(sum_rows, x, dtype)
        yield Job(f"column_sum {str(dtype)[6:]}", "column_sum", run, lambda *_: {})


def launches(
    kernel: str, arch: int, dtype: torch.dtype, accumulators: int
) -> list[tuple[ProductLaunch, bool]]:
    """(launch, whether its operands are aligned)."""
    listed = TABLE[kernel][arch][dtype.itemsize][accumulators]
    return [(launch, True) for launch in listed] + [(UNALIGNED[dtype.itemsize], False)]


def _name(kernel: str, dtype: torch.dtype, *features: str) -> str:
    return " ".join([kernel, str(dtype)[6:], *(f for f in features if f)])


def tiles(launch: ProductLaunch) -> str:
    """How a launch is cut, for the name of a job."""
    tiles = f"{launch.BLOCK_M}x{launch.BLOCK_N}x{launch.BLOCK_K}"
    return f"{tiles} warps {launch.num_warps} stages {launch.num_stages}{' TMA' * launch.TMA}"


def _dropout(full: bool) -> Dropout | None:
    return dropout_numbers(meta(dtype=torch.int64), 0.1) if full else None


def _epilogue(pre: Tensor, gated: bool, full: bool) -> Epilogue:
    """Everything at once, or nothing."""
    if not full:
        return Epilogue(None)
    bias, plane = meta(pre.shape[1], dtype=pre.dtype), matrix(pre)
    up = (bias, plane) if gated else (None, None)
    return Epilogue(bias, up[0], _dropout(full), residual=plane, pre=plane, pre_up=up[1])


def _product_job(
    launch: ProductLaunch, aligned: bool, dtype: torch.dtype, gated: bool, full: bool
) -> Job:
    rows, features, hidden = SIZES[aligned]

    def run() -> None:
        x, weight = meta(rows, features, dtype=dtype), meta(hidden, features, dtype=dtype)
        epilogue = _epilogue(meta(rows, hidden, dtype=dtype), gated, full)
        with forced(product=launch):
            product(x, weight, epilogue, activation="gelu", right_up=weight if gated else None)

    features_ = ("gated" * gated, "everything" * full, "" if aligned else "unaligned")
    name = _name("product", dtype, tiles(launch), *features_)
    return Job(name, "product_tiles", run, partial(launch_rules, launch, dtype))


def _small_job(rows: int, aligned: bool, dtype: torch.dtype, gated: bool) -> Job:
    _, features, hidden = SIZES[aligned]

    def run() -> None:
        x, weight = meta(rows, features, dtype=dtype), meta(hidden, features, dtype=dtype)
        epilogue = _epilogue(meta(rows, hidden, dtype=dtype), gated, full=True)
        small_product(x, weight, epilogue, "gelu", weight if gated else None)

    features_ = ("gated" * gated, "" if aligned else "unaligned")
    name = _name("small_product", dtype, f"{rows} rows", *features_)
    return Job(name, "small_product_tiles", run, product_rule)


def _backward_job(
    launch: ProductLaunch, aligned: bool, dtype: torch.dtype, gated: bool, again: bool, full: bool
) -> Job:
    rows, features, hidden = SIZES[aligned]

    def run() -> None:
        x, weight = meta(rows, features, dtype=dtype), meta(hidden, features, dtype=dtype)
        w_down, pre = meta(features, hidden, dtype=dtype), meta(rows, hidden, dtype=dtype)
        bias = meta(hidden, dtype=dtype) if full else None
        biases = (bias, bias if gated else None)
        a = Activated(pre, pre if gated else None)
        if again:
            a = Activated(None, None, x, weight, weight if gated else None, *biases)
        with forced(ffn_backward=launch):
            hidden_gradients(
                x,
                w_down,
                a,
                _dropout(full),
                activation="gelu",
                need_hidden=full,
                need_bias=full,
                need_bias_up=full and gated,
            )

    features_ = ("gated" * gated, "again" * again, "everything" * full)
    name = _name("ffn_backward", dtype, tiles(launch), *features_, "" if aligned else "unaligned")
    return Job(name, "ffn_backward_tiles", run, partial(launch_rules, launch, dtype))


def launch_rules(
    launch: ProductLaunch, dtype: torch.dtype, arch: int, code: Compiled
) -> dict[str, bool]:
    """What the launch promises: Hopper's products in 16 bits, and the copy engine."""
    wgmma = arch == 90 and dtype.itemsize == 2 and launch.BLOCK_M >= 64
    return {
        f"has {code.wgmma} wgmma": code.wgmma > 0 or not wgmma,
        f"has {code.tma} TMA copies": (code.tma > 0) == (launch.TMA and arch == 90),
        **product_rule(arch, code),
    }


def product_rule(_: int, code: Compiled) -> dict[str, bool]:
    """Tensor cores do the products."""
    products = code.wgmma + code.mma
    return {f"has {products} tensor core products": products > 0}
