"""Groups of weights that share a scale: a part of a row, a row, or a block of rows and columns."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llmos_fast.formats import FOUR_BIT, FP8_BLOCK


def group_columns(name: str, group_size: int, k: int) -> int:
    """Columns of a group of format ``name``: what is asked for counts for 4 bits only."""
    if name in FOUR_BIT:
        return group_size
    return FP8_BLOCK if name == "fp8_block" else k


def group_rows(name: str) -> int:
    """Rows of a group."""
    return FP8_BLOCK if name == "fp8_block" else 1


def in_groups(weight: Tensor, name: str, group_size: int) -> Tensor:
    """(N, K) -> fp32 (N / rows, groups, rows * columns), the last ones filled up with 0."""
    n, k = weight.shape
    rows, columns = group_rows(name), group_columns(name, group_size, k)
    filled = F.pad(weight.detach().float(), (0, -k % columns, 0, -n % rows))
    blocks: Tensor = filled.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    return blocks.flatten(2)


def in_rows(grouped: Tensor, name: str) -> Tensor:
    """What ``in_groups`` put into groups as a matrix again, with what was filled up."""
    by_row: Tensor = grouped.unflatten(2, (group_rows(name), -1)).transpose(1, 2)
    return by_row.flatten(2).flatten(0, 1)


def scales_of_rows(scales: Tensor, name: str, n: int) -> Tensor:
    """(N / rows, groups) -> (N, groups)."""
    rows = group_rows(name)
    return scales if rows == 1 else scales.repeat_interleave(rows, dim=0)[:n]
