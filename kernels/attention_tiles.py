"""Which tiles of scores a boolean mask leaves something of: the others are skipped whole.

Before the main kernels run, one small kernel reads the mask once and lists, for each row of tiles,
the column tiles to visit; or, for the gradients of keys, for each column of tiles the rows. The
lists hold one Int32 per tile, which is 1 / (4 BLOCK_M BLOCK_N) of the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_arguments import Arguments
from .attention_scores import locate, visible, visible_columns, visible_rows
from .runtime import launch, wide


class TileList(NamedTuple):
    """Tiles to visit: the first ``counts[batch, head, tile]`` of ``indices[batch, head, tile]``."""

    counts: Tensor
    indices: Tensor
    heads: int
    tiles: int
    capacity: int


@triton.jit
def list_tiles(
    tile_list, sequences, scores, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr
):
    """One list: of column tiles for a row of tiles, or of row tiles where ROWS."""
    slot = tl.program_id(0)
    tile = slot % tile_list.tiles
    head = slot // tile_list.tiles % tile_list.heads
    batch = slot // tile_list.tiles // tile_list.heads
    _, len_q, _, len_k, shift = locate(sequences, batch)
    if ROWS:
        first = tile * BLOCK_N
        low, high = visible_rows(first, first + BLOCK_N - 1, len_q, shift, scores)
        begin, end = low // BLOCK_M, tl.cdiv(high, BLOCK_M)
    else:
        first = tile * BLOCK_M
        low, high = visible_columns(first, first + BLOCK_M - 1, len_k, shift, scores)
        begin, end = low // BLOCK_N, tl.cdiv(high, BLOCK_N)
    count = 0
    for i in range(begin, end):
        row_tile = i if ROWS else tile
        column_tile = tile if ROWS else i
        rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        columns = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        allowed = visible(rows, columns, len_q, len_k, shift, batch, head, scores)
        allowed = allowed & (rows < len_q)
        if tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0:
            tl.store(tile_list.indices + wide(slot) * tile_list.capacity + count, i)
            count += 1
    tl.store(tile_list.counts + slot, count)


@triton.jit
def tile_range(tile_list, batch, head, tile, low, high, BLOCK: tl.constexpr):
    """Range of the loop over tiles: [low, high) in tiles, or the positions of a list."""
    if tile_list is None:
        begin = low // BLOCK
        end = tl.cdiv(high, BLOCK)
    else:
        begin = 0
        end = tl.load(tile_list.counts + _slot(tile_list, batch, head, tile))
    return begin, end


@triton.jit
def tile_start(tile_list, batch, head, tile, i, BLOCK: tl.constexpr):
    """First column, or row, of the loop's tile i."""
    index = i
    if tile_list is not None:
        slot = wide(_slot(tile_list, batch, head, tile))
        index = tl.load(tile_list.indices + slot * tile_list.capacity + i)
    return tl.multiple_of(index * BLOCK, BLOCK)


@triton.jit
def _slot(tile_list, batch, head, tile):
    # a mask that is the same for all heads has one list for all of them
    list_head = head
    if tile_list.heads == 1:
        list_head = 0
    return (batch * tile_list.heads + list_head) * tile_list.tiles + tile


def list_columns(a: Arguments, BLOCK_M: int, BLOCK_N: int) -> TileList | None:
    """For each row of tiles the column tiles that a mask leaves something of."""
    return _list(a, BLOCK_M, BLOCK_N, ROWS=False)


def list_rows(a: Arguments, BLOCK_M: int, BLOCK_N: int) -> TileList | None:
    """For each column of tiles the row tiles that a mask leaves something of."""
    return _list(a, BLOCK_M, BLOCK_N, ROWS=True)


def _list(a: Arguments, BLOCK_M: int, BLOCK_N: int, ROWS: bool) -> TileList | None:
    if a.mask is None:
        return None
    row_tiles, column_tiles = triton.cdiv(a.longest[0], BLOCK_M), triton.cdiv(a.longest[1], BLOCK_N)
    tiles, capacity = (column_tiles, row_tiles) if ROWS else (row_tiles, column_tiles)
    heads = a.mask.shape[-3] if a.mask.dim() > 2 else 1
    device = a.query.device
    counts = torch.empty(a.batch, heads, tiles, dtype=torch.int32, device=device)
    indices = torch.empty(a.batch, heads, tiles, capacity, dtype=torch.int32, device=device)
    tile_list = TileList(counts, indices, heads, tiles, capacity)
    launch(
        list_tiles,
        (counts.numel(),),
        device,
        tile_list=tile_list,
        sequences=a.sequences(),
        scores=a.scores(),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        ROWS=ROWS,
        num_warps=4,
    )
    return tile_list
