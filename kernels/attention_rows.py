"""Tiles of query, key, value and their gradients: by TMA where strides allow, else by pointers."""

import triton
import triton.language as tl
from torch import Tensor

from .runtime import wide


@triton.jit
def open_rows(
    rows, batch, head, start, length,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What ``load_rows`` reads a sequence from: a descriptor of its rows, or their address."""
    base = rows.ptr + wide(batch) * rows.batch_stride + wide(head) * rows.head_stride
    base += wide(start) * rows.row_stride
    if TMA:
        source = tl.make_tensor_descriptor(
            base,
            shape=[tl.maximum(length, 1), COLUMNS],
            strides=[rows.row_stride, 1],
            block_shape=[BLOCK, BLOCK_D],
        )
    else:
        source = base
    return source


@triton.jit
def load_rows(
    source, rows, first, length,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D] from row ``first`` on, zeros outside of the sequence."""
    if TMA:
        tile = source.load([first, 0])
    else:
        r = first + tl.arange(0, BLOCK)
        d = tl.arange(0, BLOCK_D)
        pointers = source + wide(r)[:, None] * rows.row_stride
        pointers += d[None, :] * rows.column_stride
        inside = r[:, None] < length
        if COLUMNS != BLOCK_D:
            inside = inside & (d[None, :] < COLUMNS)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(
    tile, rows, batch, head, start, first, length,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write [BLOCK, BLOCK_D] from row ``first`` on, nothing outside of the sequence."""
    base = rows.ptr + wide(batch) * rows.batch_stride + wide(head) * rows.head_stride
    r = first + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    pointers = base + wide(start + r)[:, None] * rows.row_stride
    pointers += d[None, :] * rows.column_stride
    inside = (r[:, None] < length) & (d[None, :] < COLUMNS)
    tl.store(pointers, tile.to(rows.ptr.dtype.element_ty), mask=inside)


def fits_tma(x: Tensor) -> bool:
    """Whether the copy engine can read it: 16-byte rows on 16-byte addresses, columns adjacent."""
    element = x.element_size()
    row_stride = x.stride(-2) if x.dim() == 4 else x.stride(0)
    outer = zip(x.stride()[:-1], x.shape[:-1], strict=True)
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and row_stride > 0
        and row_stride * element % 16 == 0
        and all(stride * element % 16 == 0 for stride, size in outer if size > 1)
    )
