"""The calls of add_norm and dropout that the compile gate makes for every launch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from . import add_norm, add_norm_backward, dropout
from .offline import Compiled, Job, meta

# one of each launch
FORWARD_WIDTHS = (64, 768, 4096, 8192, 16384, 32768)
BACKWARD_WIDTHS = (64, 768, 4096, 8192)
# cut into blocks, with a tail that is not a multiple of 16 bytes
WIDE = 50_001
ROWS = 4096
DTYPES = (torch.bfloat16, torch.float32)


def jobs(arch: int) -> Iterator[Job]:
    """Every launch, with all features and with as few as there can be."""
    for dtype, full in product(DTYPES, (True, False)):
        for features in (*FORWARD_WIDTHS, WIDE):
            yield _forward_job(features, dtype, full)
        for features in (*BACKWARD_WIDTHS, WIDE):
            yield _backward_job("add_norm_backward", features, dtype, full)
        yield _backward_job("add_norm_backward_means", WIDE, dtype, full)
        for features in (64, 4096):
            yield _dropout_job(features, dtype, full)
    yield _backward_job("add_norm_backward_sum", 4096, torch.bfloat16, True)


def _example(features: int, dtype: torch.dtype, full: bool) -> dict[str, Any]:
    """Tensors of a call; all features: dropout, residual, LayerNorm with weight and bias."""
    rows = meta(ROWS, features, dtype=dtype)
    vector = meta(features, dtype=dtype) if full else None
    return {
        "x": rows,
        "residual": rows if full else None,
        "weight": vector,
        "bias": vector,
        "p": 0.1 if full else 0.0,
        "seed": meta(dtype=torch.int64) if full else None,
    }


def _forward_job(features: int, dtype: torch.dtype, full: bool) -> Job:
    def run() -> None:
        add_norm.launch_forward(**_example(features, dtype, full), rms=not full, eps=1e-5)

    kernel = "add_norm_forward_wide" if features == WIDE else "add_norm_forward"
    return _job(kernel, features, dtype, full, run)


def _backward_job(kernel: str, features: int, dtype: torch.dtype, full: bool) -> Job:
    def run() -> None:
        call = _example(features, dtype, full)
        rows, statistics = call["x"], meta(ROWS, dtype=torch.float32)
        d_total = rows if full else None
        dtypes = (dtype, dtype if full else None, dtype if full else None, dtype if full else None)
        add_norm_backward.backward(
            rows, d_total, rows, call["weight"], statistics, statistics, not full,
            call["p"], call["seed"], *dtypes,
        )  # fmt: skip

    return _job(kernel, features, dtype, full, run)


def _dropout_job(columns: int, dtype: torch.dtype, full: bool) -> Job:
    def run() -> None:
        call = _example(columns, dtype, True)
        residual = call["residual"] if full else None
        dropout.launch_forward(call["x"], residual, call["p"], call["seed"], dtype)

    return _job("dropout", columns, dtype, full, run)


def _job(kernel: str, width: int, dtype: torch.dtype, full: bool, run: Any) -> Job:
    features = "all features" if full else "no features"
    return Job(f"{kernel} {str(dtype)[6:]} {width} columns: {features}", kernel, run, _no_rules)


def _no_rules(arch: int, code: Compiled) -> dict[str, bool]:
    return {}
