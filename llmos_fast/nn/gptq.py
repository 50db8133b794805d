"""GPTQ: rounding that makes up for its errors in the weights that are not rounded yet.

Frantar et al., arXiv 2210.17323, with its "act order" and "static groups": columns are rounded by
falling energy of their inputs, and the scales of all groups are chosen before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.formats import levels_of_codes
from llmos_fast.groups import group_columns, group_rows, in_groups, scales_of_rows
from llmos_fast.quantize import QuantizedWeight, format_of, from_codes
from llmos_fast.rounding import choose_scales, encode

# Columns whose errors are spread within the block at once, over the rest in one product.
_BLOCK = 128
# Added to the diagonal of X^T X, as a share of its mean; 10 times more until it can be factored.
_DAMPING = 0.01


def gptq(weight: Tensor, hessian: Tensor, scheme: str, group_size: int) -> QuantizedWeight:
    """Quantize ``weight`` so that |X (W - W')^T| is small, greedily, column after column.

    weight:  Float[out_features in_features]
    hessian: fp32 (in_features, in_features), X^T X of the layer's inputs (a factor is without
             effect); all the algorithm needs beside the weight is a few matrices of this size

    Scales are those of the "mse" method with every column's error weighted by the energy of its
    input. A column whose input is always 0 is rounded to nearest. Raises ValueError where
    ``hessian`` is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("gptq: hessian must be finite, got inf or NaN: check the inputs")
    name = format_of(scheme)
    damped = _damp(hessian.float(), _DAMPING)
    energy = damped.diagonal()
    grouped = in_groups(weight, name, group_size)
    importance = in_groups(energy.expand(group_rows(name), -1), name, group_size)
    scales, zeros = choose_scales(grouped, name, "mse", importance[0])
    n, k = weight.shape
    scales_by_row = scales_of_rows(scales, name, n)

    order = energy.argsort(descending=True, stable=True)
    # rows are columns of the weight: what a step reads and writes lies together
    columns = weight.detach().float().T[order].contiguous()
    spread = _inverse_factor(hessian.float()[order][:, order])
    codes = torch.empty_like(columns, dtype=torch.uint8)
    groups = (order // group_columns(name, group_size, k)).tolist()
    for begin in range(0, len(groups), _BLOCK):
        end = min(begin + _BLOCK, len(groups))
        errors = torch.empty_like(columns[begin:end])
        for j in range(begin, end):
            scale = scales_by_row[:, groups[j]]
            zero = None if zeros is None else zeros[:, groups[j]]
            code = encode(columns[j, :, None], name, scale, zero)[:, 0]
            rounded = levels_of_codes(name, code, zero, torch.float32) * scale
            errors[j - begin] = error = (columns[j] - rounded) / spread[j, j]
            columns[j + 1 : end] -= spread[j, j + 1 : end, None] * error
            codes[j] = code
        columns[end:] -= spread[begin:end, end:].T @ errors
    codes = codes[order.argsort()].T.contiguous()
    return from_codes(codes, scales, zeros, scheme, group_size)


def _damp(hessian: Tensor, share: float) -> Tensor:
    mean = hessian.diagonal().mean()
    added = torch.where(mean > 0, share * mean, 1.0)
    return hessian + added * torch.eye(len(hessian), device=hessian.device)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with U^T U the inverse of ``hessian``, damped as much as that needs."""
    damping = _DAMPING
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damp(hessian, damping))
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
