"""The calls of linear_cross_entropy that the compile gate makes, for every launch of its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product as combinations

import torch

from .ffn_jobs import launch_rules, launches, tiles
from .launch import forced
from .linear_cross_entropy_backward import gradients
from .linear_cross_entropy_forward import Loss, losses
from .offline import Job, meta
from .product_launch import ProductLaunch

DTYPES = (torch.bfloat16, torch.float32)
# rows, features, classes; odd ones cannot be loaded 16 bytes at a time. Several chunks.
SIZES = {True: (8192, 1024, 50257), False: (8192, 1021, 50257)}
KERNELS = {
    "cross_entropy_forward": "cross_entropy_parts",
    "cross_entropy_backward": "d_logits_tiles",
    "cross_entropy_hidden": "add_product_tiles",
}


def jobs(arch: int) -> Iterator[Job]:
    """All kernels, with nothing but the loss and with everything."""
    for dtype, kernel in combinations(DTYPES, KERNELS):
        for launch, aligned in launches(kernel, arch, dtype, 1):
            for full in (False, True):
                if full or kernel != "cross_entropy_hidden":
                    yield _job(kernel, launch, aligned, dtype, full)
    for full in (False, True):
        run = _calls(torch.bfloat16, True, full)
        for small in ("join_parts", "reduce_losses"):
            yield Job(f"{small}{' everything' * full}", small, run, lambda *_: {})


def _job(kernel: str, launch: ProductLaunch, aligned: bool, dtype: torch.dtype, full: bool) -> Job:
    calls = _calls(dtype, aligned, full)

    def run() -> None:
        with forced(**{kernel: launch}):
            calls()

    features = " everything" * full + " unaligned" * (not aligned)
    name = f"{kernel} {str(dtype)[6:]} {tiles(launch)}{features}"
    return Job(name, KERNELS[kernel], run, partial(launch_rules, launch, dtype))


def _calls(dtype: torch.dtype, aligned: bool, full: bool) -> Callable[[], None]:
    """Losses and their gradients, all features on or off."""
    rows, features, classes = SIZES[aligned]

    def run() -> None:
        hidden, weight = meta(rows, features, dtype=dtype), meta(classes, features, dtype=dtype)
        target = meta(rows, dtype=torch.int64)
        bias = meta(classes, dtype=dtype) if full else None
        loss = Loss(-100, 0.1, 1e-4, 30.0) if full else Loss(-100, 0.0, 0.0, 0.0)
        reduction = "mean" if full else "sum"
        _, lse, count = losses(hidden, weight, target, bias, loss, reduction)
        d_losses = meta(*([] if full else [rows]), dtype=torch.float32)
        gradients(
            d_losses, hidden, weight, target, bias, lse, count if full else None, loss,
            [True, True, full],
        )  # fmt: skip

    return run
