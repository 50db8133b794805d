"""How a weight is rounded: the choice of scales and zero points, and the nearest codes.

``method`` names the choice:

    absmax   the least scales under which no weight lies beyond the outermost level
    mse      of a few scales below and above that, and of the least-squares fit to the levels that
             the best of them gives, the one with the least squared error of its group

The search tries int4 scales of both signs, so that the level -8 can stand for a positive weight,
as in llama.cpp's Q4_0. It compares scales as they are stored, so it is never worse than absmax.

Sources: absmax as in LLM.int8() (arXiv 2208.07339); the search for clipped scales as in OMSE
(Choukroun et al., arXiv 1902.06822); the fit as in llama.cpp's ``make_qx_quants``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from llmos_fast.formats import (
    FP8,
    FP8_MAX,
    NF4_LEVELS,
    levels_of_codes,
    round_scales,
    scale_dtype,
)

METHODS = ("mse", "absmax")
# Weights searched at a time: 1 MiB of fp32 stays in a core's cache.
_BLOCK = 2**18
# absmax scale = amax / this
_DIVISORS = {"int8": 127.0, "int4": 7.5, "nf4": 1.0} | dict.fromkeys(FP8, FP8_MAX)
# Candidates: amax (of int4: the weight of the largest magnitude, signed) over each of these; for
# int4_asym the two ends of the range, shrunk. More of them gain less than 1 % on Gaussian weights.
_TRIED = {
    "int8": tuple(127 / share for share in (0.97, 0.94, 0.9, 0.85, 0.8)),
    "int4": (-9.6, -8.8, -8.0, -7.3, -6.6),
    "nf4": tuple(1 / share for share in (1.1, 1.03, 0.96, 0.9, 0.8)),
    **dict.fromkeys(FP8, tuple(FP8_MAX / share for share in (0.93, 0.87, 0.8))),
}
_TRIED_ENDS = ((1.0, 0.9), (0.9, 1.0), (0.9, 0.9))


def choose_scales(
    grouped: Tensor, name: str, method: str, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales, as they will be stored, and zero points of every group.

    grouped:    fp32 (N, groups, group)
    name:       of the format
    method:     "mse" or "absmax"
    importance: fp32 (groups, group), what a squared error counts in "mse"; None: all the same
    returns:    fp32 (N, groups), and for int4_asym the same of integers 0..15, else None
    """
    if method == "absmax":
        return _absmax(grouped, name)
    rows = max(1, _BLOCK // max(1, grouped[0].numel()))
    found = [_search(block, name, importance) for block in grouped.split(rows)]
    scales = torch.cat([scales for scales, _ in found])
    zeros = [zeros for _, zeros in found if zeros is not None]
    return scales, torch.cat(zeros) if zeros else None


def encode(grouped: Tensor, name: str, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """uint8 codes like ``grouped``: for every weight the level nearest to it.

    scales, zeros: as ``choose_scales`` returns them
    """
    levels = _nearest_levels(grouped, name, scales, zeros)
    if name == "nf4":
        return _nf4_codes(levels).to(torch.uint8)
    if name in FP8:
        return levels.to(torch.float8_e4m3fn).view(torch.uint8)
    if name == "int4_asym":
        assert zeros is not None
        return levels.add_(zeros[..., None]).to(torch.uint8)
    return levels.add_(128 if name == "int8" else 8).to(torch.uint8)


def _nf4_codes(scaled: Tensor) -> Tensor:
    """Codes, in fp32, of the levels nearest to ``scaled``; 8 times as fast as torch.bucketize."""
    codes, above = torch.zeros_like(scaled), torch.empty_like(scaled)
    for low, high in pairwise(NF4_LEVELS):
        codes += torch.gt(scaled, (low + high) / 2, out=above)
    return codes


def _nearest_levels(grouped: Tensor, name: str, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """fp32 levels like ``grouped``, which they give back when multiplied by the scales."""
    inverse = 1 / scales
    # a scale too small for that has a group of zeros
    scaled = grouped * torch.where(torch.isfinite(inverse), inverse, 0)[..., None]
    if name == "int8":
        return scaled.round_().clamp_(-127, 127)
    if name == "int4":
        return scaled.round_().clamp_(-8, 7)
    if name == "int4_asym":
        assert zeros is not None
        low = -zeros[..., None]
        return scaled.round_().clamp_(low, low + 15)
    if name == "nf4":
        return levels_of_codes(name, _nf4_codes(scaled), None, torch.float32)
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _absmax(grouped: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    if name != "int4_asym":
        return round_scales(grouped.abs().amax(-1) / _DIVISORS[name], name), None
    low, high = _ends(grouped)
    scales = round_scales(high / 15 - low / 15, name)
    return scales, _zero_points(low, scales)


def _ends(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest weight of every group, with 0 between them."""
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def _zero_points(low: Tensor, scales: Tensor) -> Tensor:
    """Codes of 0 where the code 0 stands for ``low``; 0 without a scale."""
    return (-low / scales).nan_to_num(0, 15, 0).round().clamp(0, 15)


def _search(grouped: Tensor, name: str, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scales, zeros = _absmax(grouped, name)

    def squared_error(scales: Tensor, zeros: Tensor | None) -> Tensor:
        levels = _nearest_levels(grouped, name, scales, zeros)
        error = levels.mul_(scales[..., None]).sub_(grouped).square_()
        return (error if importance is None else error.mul_(importance)).sum(-1)

    least = squared_error(scales, zeros)

    def keep_better(other: Tensor, other_zeros: Tensor | None) -> None:
        nonlocal scales, zeros, least
        error = squared_error(other, other_zeros)
        better = error < least  # never where the candidate is not finite
        scales, least = torch.where(better, other, scales), torch.where(better, error, least)
        if zeros is not None and other_zeros is not None:
            zeros = torch.where(better, other_zeros, zeros)

    for candidate in _candidates(grouped, name):
        keep_better(*candidate)
    levels = _nearest_levels(grouped, name, scales, zeros)
    weighted = levels if importance is None else levels * importance
    fit = (weighted * grouped).sum(-1) / (weighted * levels).sum(-1)
    keep_better(_as_stored(fit, name), zeros)
    return scales, zeros


def _candidates(grouped: Tensor, name: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    if name == "int4_asym":
        low, high = _ends(grouped)
        for shrink_low, shrink_high in _TRIED_ENDS:
            scales = _as_stored((high * shrink_high - low * shrink_low) / 15, name)
            yield scales, _zero_points(low * shrink_low, scales)
        return
    peak = grouped.abs().amax(-1)
    if name == "int4":
        peak = torch.where(grouped.amax(-1) == peak, peak, -peak)
    for divisor in _TRIED[name]:
        yield _as_stored(peak / divisor, name), None


def _as_stored(scales: Tensor, name: str) -> Tensor:
    return scales.to(scale_dtype(name)).float()
