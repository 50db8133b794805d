"""Whether this GPU computes what quant_matmul_panels.py says, asked before a launch's first use.

Integers and powers of two have one right product, however it is summed: every launch has to give
exactly what plain torch gives in float64 from the weight's definition, off every tile, with and
without parts of k, again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from llmos_fast.formats import FOUR_BIT
from llmos_fast.quantize import QuantizedWeight, format_of, from_codes, rounds_activations
from llmos_fast.reference.quant_matmul import finish

from . import verdicts

# n and k: many parts of k, and one; gated pairs need 32 rows
SIZES = ((2064, 4104), (300, 43))
GATED_SIZES = ((2080, 4104), (352, 43))
ROUNDS = 10

Function = Callable[..., Tensor]


class Case(NamedTuple):
    """What decides about the code of a product.

    Attributes:
        scheme: of the weight.
        group_size: of the weight; 0 for whole rows.
        dtype: of x.
        rows: of x at most, with the same launch.
        gated: whether two weights lie in turn.
    """

    scheme: str
    group_size: int
    dtype: torch.dtype
    rows: int
    gated: bool


def refusal(
    case: Case, product: Function, dequantize: Function, device: torch.device
) -> str | None:
    """Why these kernels must not be used for ``case``; None where they passed."""
    test = partial(passes, case, product, dequantize, device)
    return verdicts.refusal(device, name(case), test)


def name(case: Case) -> str:
    """As it is kept and shown."""
    gated = ", gated" if case.gated else ""
    return (
        f"quant_matmul({case.scheme}, groups of {case.group_size}, {case.dtype}, "
        f"{case.rows} rows{gated})"
    )


def passes(case: Case, product: Function, dequantize: Function, device: torch.device) -> bool:
    """Whether these functions give exact results."""
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    random = torch.Generator(device).manual_seed(0)
    activation = "relu" if case.gated else ""
    for n, k in GATED_SIZES if case.gated else SIZES:
        weight = _weight(random, n, k, case)
        parts = (weight.packed, weight.scales, weight.zero_points)
        dense = weight.dequantize(case.dtype)
        rest = (case.scheme, weight.group_size, n)
        wrong |= (dequantize(*parts, *rest, k, case.dtype) != dense).any()
        x, bias, residual = _inputs(random, n, k, case)
        y = x.double() @ dense.double().T + bias.double()
        expected = finish(y, activation or None, case.gated, residual).to(case.dtype)
        for _ in range(ROUNDS):
            found = product(x, *parts, bias, residual, *rest, activation, case.gated)
            # NaN differs from everything
            wrong |= (found != expected).any()
    return not bool(wrong)


def _integers(random: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=random, device=random.device)


def _weight(random: torch.Generator, n: int, k: int, case: Case) -> QuantizedWeight:
    """Random codes; scales are powers of two, so that scale times level is not rounded."""
    form = format_of(case.scheme)
    group_size = case.group_size or k
    groups = -(-k // group_size)
    codes = _integers(random, 0, 15 if form in FOUR_BIT else 255, n, k)
    if form == "nf4" and case.dtype == torch.float32:
        # 0, 7 and 15, whose levels are -1, 0 and 1: sums of the others are rounded
        codes = _integers(random, 0, 2, n, k) * 15 // 2
    signs = 2 * _integers(random, 0, 1, n, groups) - 1
    zeros = _integers(random, 0, 15, n, groups) if form == "int4_asym" else None
    scales = signs * 2.0 ** _integers(random, -8, -6, n, groups)
    return from_codes(codes.to(torch.uint8), scales, zeros, case.scheme, group_size)


def _inputs(
    random: torch.Generator, n: int, k: int, case: Case
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, bias and residual: few and small numbers, so that no sum needs more than fp32's 24 bits.

    A gate's product with its partner is rounded to fp32: nothing may be added to it.
    """
    rows = case.rows - 3
    x = _integers(random, -1, 1, rows, k) * (_integers(random, 0, 63, rows, k) == 0)
    if rounds_activations(case.scheme):
        x[:, ::32] = 127  # the scale of every group is then 1
    bias = _integers(random, -4, 4, n) / 64
    residual = (_integers(random, -4, 4, rows, n) / 64).to(case.dtype)
    return x.to(case.dtype), bias.to(case.dtype), None if case.gated else residual
