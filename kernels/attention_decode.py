"""attention_decode on the GPU: how a launch of attention_split.py is cut, and what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from llmos_fast.library import register

from .attention_arguments import Scores, rows
from .attention_split import Factors, Pages, Partials, attention_split
from .launch import padded
from .runtime import DEVICES, launch, product_precision, refusal, zero_counters

# by bytes of an element of the queries: what fits into registers
LARGEST_HEAD_DIM = {2: 512, 4: 128}
# of an H100, for the interpreter
_PROCESSORS = 132
_BLOCKS_PER_PROCESSOR = 2
# what it takes to start a block, in keys that it could have read
_START = 128
# partials come from the L2 cache and go through no product: cheaper than as many bytes of keys
_JOIN_COST = 0.5


@dataclass(frozen=True)
class DecodeLaunch:
    """How the kernel is cut into tiles and given warps.

    Attributes:
        BLOCK_M: rows of a tile, queries times the query heads of one KV head.
        BLOCK_N: keys of a tile.
        JOIN_STAGES: partials that the last block loads ahead.
        num_warps: of a block.
        num_stages: tiles of keys and values that are loaded ahead.
        maxnreg: registers of a thread. Two blocks of 4 warps share a processor's 65,536 also with
            the most that there can be; left alone, ptxas may spill to make room for four.
    """

    BLOCK_M: int
    BLOCK_N: int
    JOIN_STAGES: int
    num_warps: int
    num_stages: int
    maxnreg: int = 255


@lru_cache
def choose_launch(
    group_rows: int, query_bytes: int, cache_bytes: int, head_dim: int, paged: bool
) -> DecodeLaunch:
    """The launch for ``group_rows`` rows of one KV head.

    Every warp holds all rows of the queries, so that registers bound the tiles: with these none
    are spilled. The shared memory lets two blocks share a processor.

    Args:
        group_rows: queries times the query heads of one KV head.
        query_bytes: of an element of the queries, in which the products are computed.
        cache_bytes: of an element of the caches; converting them takes registers.
        head_dim: the larger of head_dim and head_dim_v, padded.
        paged: the addresses of a tile must be loaded too, one stage before it.
    """
    block_m = 32 if group_rows > 16 and query_bytes == 2 and head_dim <= 256 else 16
    elements = 2**12 if block_m == 32 and cache_bytes == 1 else 2**14 // query_bytes
    return DecodeLaunch(
        BLOCK_M=block_m,
        BLOCK_N=min(64, elements // head_dim),
        JOIN_STAGES=max(2, min(8, 1 + 3 * 2**14 // (4 * block_m * head_dim))),
        num_warps=4,
        num_stages=4 if paged else 3,
    )


def launches() -> Iterator[DecodeLaunch]:
    """Every launch that can be chosen."""
    for query_bytes, largest in LARGEST_HEAD_DIM.items():
        head_dims = [2**power for power in range(6, largest.bit_length())]
        for cache_bytes, head_dim in product((1, query_bytes), head_dims):
            for group_rows, paged in product((16, 32), (False, True)):
                yield choose_launch(group_rows, query_bytes, cache_bytes, head_dim, paged)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=4096)
def num_splits(programs: int, tiles: int, tile: int, part: float, processors: int) -> int:
    """Into how many parts the keys of a sequence are cut, from shapes alone.

    It minimises a model of the time, in keys that one block reads: every wave of blocks starts and
    reads its share, and the last block reads the partials.

    Args:
        programs: blocks in a launch without splits.
        tiles: tiles of keys that the cache has room for.
        tile: keys of a tile.
        part: size of one split's partials, in keys.
        processors: of the GPU.
    """
    slots = _BLOCKS_PER_PROCESSOR * processors

    def time(splits: int) -> float:
        waves = _cdiv(programs * splits, slots)
        return waves * (_START + _cdiv(tiles, splits) * tile) + splits * part * _JOIN_COST

    most = max(1, min(tiles, _cdiv(slots, programs)))
    return min(range(1, most + 1), key=time)


def unsupported(
    *,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    **_: object,
) -> str | None:
    """Needs CUDA tensors, and head dimensions up to 512 (128 for fp32)."""
    if (reason := refusal(query, sinks, alibi_slopes, key_scale, value_scale)) is not None:
        return reason
    largest = LARGEST_HEAD_DIM[query.element_size()]
    for tensor in (key_cache, value_cache):
        if tensor.layout is not torch.strided:
            return f"needs strided tensors, got {tensor.layout}"
        if not 1 <= tensor.shape[-1] <= largest:
            rule = f"needs head dimensions of 1 to {largest} for {query.dtype}"
            return f"{rule}, got {tensor.shape[-1]}"
    if key_cache.dtype == torch.float8_e4m3fn and query.is_cuda:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < (8, 9):
            return f"needs compute capability 8.9 or more for float8 caches, got {capability}"
    return None


def forward(
    *,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    """See llmos_fast.ops.attention_decode; the right side of the window ends before the causal."""
    out: Tensor = _attention_decode(
        query,
        key_cache,
        value_cache,
        cache_lengths,
        block_table,
        key_scale,
        value_scale,
        sinks,
        alibi_slopes,
        scale,
        window[0],
        softcap,
    )
    return out


def _empty_out(query: Tensor, value_cache: Tensor) -> Tensor:
    """Uninitialised, with heads inside rows, as the output projection reads them."""
    batch, heads_q, seq_q, _ = query.shape
    return query.new_empty(batch, seq_q, heads_q, value_cache.shape[3]).transpose(1, 2)


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    softcap: float,
) -> Tensor:
    """The registered op: launches the kernel."""
    out = _empty_out(query, value_cache)
    if out.numel() == 0:
        return out
    batch, heads_q, seq_q, head_dim = query.shape
    _, heads_kv, page_size, head_dim_v = value_cache.shape
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    group_rows = heads_q // heads_kv * seq_q
    item = key_cache.element_size()
    block_d, block_dv = padded(head_dim), padded(head_dim_v)
    config = choose_launch(
        group_rows, query.element_size(), item, max(block_d, block_dv), block_table is not None
    )
    programs = batch * heads_kv * _cdiv(group_rows, config.BLOCK_M)
    splits = num_splits(
        programs,
        _cdiv(capacity, config.BLOCK_N),
        config.BLOCK_N,
        min(group_rows, config.BLOCK_M) * 4 * head_dim_v / (item * (head_dim + head_dim_v)),
        _processors(query.device),
    )
    launch(
        attention_split,
        (programs, splits),
        query.device,
        query=rows(query),
        key=rows(key_cache),
        value=rows(value_cache),
        out=rows(out),
        cache_lengths=cache_lengths.contiguous(),
        pages=_pages(block_table, key_cache.shape[0]),
        key_factors=_factors(key_scale, key_cache),
        value_factors=_factors(value_scale, value_cache),
        scores=_scores(scale, softcap, window_left, alibi_slopes, sinks),
        partials=_partials(programs, splits, config.BLOCK_M, block_dv, query.device),
        heads_kv=heads_kv,
        group=heads_q // heads_kv,
        seq_q=seq_q,
        capacity=capacity,
        splits=splits,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        PAGE_SIZE=0 if block_table is None else page_size,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        PRECISION=product_precision(query.dtype),
        **vars(config),
    )
    return out


def _decode_fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> Tensor:
    return _empty_out(query, value_cache)


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _pages(block_table: Tensor | None, total: int) -> Pages | None:
    if block_table is None:
        return None
    return Pages(block_table.contiguous(), block_table.shape[1], total)


def _factors(scale: Tensor | None, cache: Tensor) -> Factors | None:
    return None if scale is None else Factors(scale, *scale.expand(cache.shape[:3]).stride())


def _scores(
    scale: float,
    softcap: float,
    window_left: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Scores:
    alibi = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    return Scores(
        scale,
        softcap or None,
        left=window_left if window_left >= 0 else None,
        right=0,
        mask=None,
        bias=None,
        alibi=alibi,
        alibi_batch_stride=alibi.shape[1] if alibi is not None and alibi.dim() == 2 else 0,
        sinks=None if sinks is None else sinks.contiguous(),
        dropout=None,
        folds=1 if softcap == 0 and alibi is None and scale > 0 else None,
    )


def _partials(
    programs: int, splits: int, block_m: int, block_dv: int, device: torch.device
) -> Partials | None:
    if splits == 1:
        return None
    parts = programs * splits
    return Partials(
        torch.empty(parts, block_m, block_dv, dtype=torch.float32, device=device),
        torch.empty(parts, 2, block_m, dtype=torch.float32, device=device),
        zero_counters(programs, device),
    )


_attention_decode = register(
    "attention_decode_triton(Tensor query, Tensor key_cache, Tensor value_cache, "
    "Tensor cache_lengths, Tensor? block_table, Tensor? key_scale, Tensor? value_scale, "
    "Tensor? sinks, Tensor? alibi_slopes, float scale, int window_left, float softcap) -> Tensor",
    decode,
    _decode_fake,
    DEVICES,
)
