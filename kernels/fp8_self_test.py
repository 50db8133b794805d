"""Whether this GPU computes what fp8_matmul says, asked before its first use on a machine.

Integers and powers of two have one right product, however it is summed. Long sums go beyond the 14
bits or so of Hopper's own accumulators: a product that does not add parts of them in fp32 is found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmos_fast.formats import FP8_BLOCK, FP8_MAX
from llmos_fast.quantize import QuantizedWeight, from_codes, pair_multiple
from llmos_fast.reference.quant_matmul import finish

from . import verdicts
from .fp8_matmul import fp8_matmul

# rows of x, columns of the result, k: one for each launch of the tables, off every tile
SIZES = (
    (1500, 1520, 528),
    *((rows, 144, 32784) for rows in (150, 60, 30, 5)),
    *((rows, 77, 33001) for rows in (70, 60, 30, 5)),
)
ROUNDS = 10


def refusal(device: torch.device, blocks: bool, dtype: torch.dtype, gated: bool) -> str | None:
    """Why the kernels must not be used for x of this dtype; None where they passed."""
    name = f"fp8_matmul({'blocks' if blocks else 'rows'}, {dtype}{', gated' * gated})"
    return verdicts.refusal(device, name, lambda: passes(fp8_matmul, device, blocks, dtype, gated))


# what is traced above is a constant; as in self_test.py
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def passes(
    multiply: Callable[..., Tensor],
    device: torch.device,
    blocks: bool,
    dtype: torch.dtype,
    gated: bool,
    sizes: tuple[tuple[int, int, int], ...] = SIZES,
    rounds: int = ROUNDS,
) -> bool:
    """Whether ``multiply``, in the place of ``fp8_matmul``, gives exact results, every time."""
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    random = torch.Generator(device).manual_seed(0)
    for m, n, k in sizes:
        x, weight = _activations(random, m, k, blocks), _weight(random, n, k, blocks, gated)
        rows = len(weight.packed)
        bias = _integers(random, -8, 8, rows)
        # a gate's product with its partner is rounded to fp32: nothing may be added to it
        residual = None if gated else _integers(random, -8, 8, m, n).to(dtype)
        y = x.double() @ weight.dequantize(torch.float64).T + bias
        # what the residual is added to is rounded once, in fp32
        expected = finish(y, "relu", gated, residual, rows // 2).to(dtype)
        tensors = (x.to(dtype), weight.packed, weight.scales, bias.to(dtype), residual)
        for _ in range(rounds):
            # NaN differs from everything
            wrong |= (multiply(*tensors, blocks, "relu", gated) != expected).any()
    return not bool(wrong)


def _integers(random: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=random, device=random.device)


def _activations(random: torch.Generator, m: int, k: int, blocks: bool) -> Tensor:
    """Integers around 1 with one of 448 in each group, times a power of two of the group's own."""
    x = _integers(random, -1, 3, m, k).float()
    size = FP8_BLOCK if blocks else k
    first = torch.arange(0, k, size, device=x.device)
    places = first + _integers(random, 0, size - 1, m, len(first))
    x.scatter_(1, places.clamp(max=k - 1), FP8_MAX)
    powers = 2.0 ** _integers(random, -1, 1, m, len(first))
    return x * powers.repeat_interleave(size, dim=1)[:, :k]


def _weight(random: torch.Generator, n: int, k: int, blocks: bool, gated: bool) -> QuantizedWeight:
    """Integers around 1, and scales that are powers of two.

    Where gated a pair for ``n`` columns, or for as many more as blocks need: small enough for their
    products to be numbers of fp16, and with signs, which tell the gate from its partner.
    """
    scheme = "fp8_block" if blocks else "fp8"
    if gated:
        n = 2 * (n + -n % pair_multiple(scheme))
    codes = _integers(random, -1, 3, n, k).to(torch.float8_e4m3fn).view(torch.uint8)
    rows, groups = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)) if blocks else (n, 1)
    scales = 2.0 ** _integers(random, -1, 1, rows, groups)
    if gated:
        scales *= (2 * _integers(random, 0, 1, rows, groups) - 1) / 1024
    return from_codes(codes, scales, None, scheme, FP8_BLOCK)
