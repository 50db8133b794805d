"""Sums over the rows of a matrix: gradients of biases. Deterministic, in two launches at most."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matrix import Matrix, matrix
from .runtime import launch, wide

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128
# rows that one program of the first launch adds up, so that a gradient of 32k rows fills a GPU
ROWS_EACH = 512


@triton.jit
def column_sum(
    out, x, rows, columns, rows_each,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of ``rows_each`` rows of ``x`` into each row of ``out`` [parts columns]."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for row in tl.range(first, last, BLOCK_ROWS):
        r = row + tl.arange(0, BLOCK_ROWS)
        pointers = x.ptr + wide(r)[:, None] * x.row_stride + wide(c)[None, :] * x.column_stride
        inside = (r[:, None] < last) & (c[None, :] < columns)
        acc += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(acc, axis=0).to(out.dtype.element_ty)
    tl.store(out + wide(part) * columns + c, total, mask=c < columns)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float[columns] in ``dtype``: the sum of ``x`` [rows columns] over its rows, in fp32."""
    rows, columns = x.shape
    parts = max(1, triton.cdiv(rows, ROWS_EACH))
    if parts > 1:
        partial = _launch(x, x.new_empty(parts, columns, dtype=torch.float32), ROWS_EACH)
        return sum_rows(partial, dtype)
    return _launch(x, x.new_empty(1, columns, dtype=dtype), rows)[0]


def _launch(x: Tensor, out: Tensor, rows_each: int) -> Tensor:
    parts, columns = out.shape
    source: Matrix = matrix(x)
    launch(
        column_sum,
        (parts, triton.cdiv(columns, BLOCK_COLUMNS)),
        x.device,
        out=out,
        x=source,
        rows=x.shape[0],
        columns=columns,
        rows_each=rows_each,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
    )
    return out
