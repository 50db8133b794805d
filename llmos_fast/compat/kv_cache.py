"""flash-attn's step of generation: rotate, append to the cache in place, attend to the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast import ops
from llmos_fast.compat.alignment import aligned_attention, open_sides
from llmos_fast.ops import check
from llmos_fast.ops.attention_decode import PAGE_MULTIPLE

_FUNCTION = "flash_attn_with_kvcache"


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache of keys and values, to which k and v are appended first.

    Where ``causal``, or with one query, this is ``ops.attention_decode``, and nothing waits for the
    device. ``cache_leftpad``, ``return_softmax_lse`` and several queries without ``causal`` take
    ``ops.attention``, and copy the cache's values; pages whose size is not a multiple of 16, or a
    capacity that is not, with ``cache_batch_idx``, are gathered first.

    Args:
        q: Float[batch seqlen_q nheads headdim].
        k_cache: Float[batch_cache capacity nheads_k headdim], or with ``block_table``
            Float[num_pages page_size nheads_k headdim]; changed in place where k is given.
        v_cache: likewise.
        k: Float[batch seqlen_new nheads_k headdim], written to the cache at cache_seqlens,
            cache_seqlens + 1, ...
        v: likewise, written as it is.
        rotary_cos: Float[seqlen_rotary rotary_dim / 2], seqlen_rotary at least the capacity: k is
            rotated at the positions it is written to, and q at cache_seqlens, cache_seqlens + 1,
            ... where ``causal`` or with a window, else all of it at cache_seqlens. Needs k.
        rotary_sin: likewise.
        cache_seqlens: how many tokens each sequence has in the cache before k, an int or
            Int[batch]; default the capacity, which leaves no room for k.
        cache_batch_idx: Int[batch], the cache's row of each sequence; default 0, 1, ...
        cache_leftpad: Int[batch]; the tokens before this position of the cache are hidden.
        block_table: Int[batch max_pages]: token t of sequence b is row t % page_size of page
            block_table[b, t // page_size]. Excludes cache_batch_idx.
        softmax_scale: as for ``flash_attn_func``, where seqlen_k is the number of tokens of the
            sequence, k's included.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        rotary_interleaved: features 2 i and 2 i + 1 form a pair, else i and i + rotary_dim / 2.
        alibi_slopes: as for ``flash_attn_func``.
        num_splits: accepted; how the keys are split among processors is this package's choice.
        return_softmax_lse: also return the log-sum-exp of the scores.

    Returns:
        out: Float[batch seqlen_q nheads headdim] in q's dtype, and with ``return_softmax_lse``
        also Float32[batch nheads seqlen_q], -inf for a row without keys. No gradients.

    Raises:
        ValueError: naming op, argument, rule and value, before the cache is changed.
    """
    _check_cache(q, k_cache, v_cache, cache_batch_idx, cache_leftpad, block_table)
    # a row of the cache is a page as long as the cache
    table = block_table if cache_batch_idx is None else cache_batch_idx[:, None]
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    _check_new(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, capacity)
    _check_heads(q, k_cache, alibi_slopes)
    lengths = _lengths(cache_seqlens, 0 if k is None else k.shape[1], capacity, q)
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            by_row = causal or open_sides(window_size) != (-1, -1)
            q, k = _rotate(q, k, rotary_cos, rotary_sin, lengths, by_row, rotary_interleaved)
        _append(k_cache, v_cache, k, v, lengths, table)
        lengths = lengths + k.shape[1]
    # one query may attend to every key: it stands at the last one
    causal = causal or q.shape[1] == 1
    if not causal or cache_leftpad is not None or return_softmax_lse:
        key, value = _dense(k_cache, table, q), _dense(v_cache, table, q)
        out, lse = aligned_attention(
            q.transpose(1, 2),
            key.transpose(1, 2),
            _only_valid(value, cache_leftpad, lengths).transpose(1, 2),
            causal=causal,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            scale=softmax_scale,
            key_starts=cache_leftpad,
            key_lengths=lengths,
        )
        return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)
    if table is None or k_cache.shape[1] % PAGE_MULTIPLE:
        k_cache, v_cache, table = _dense(k_cache, table, q), _dense(v_cache, table, q), None
    out = ops.attention_decode(
        q.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        lengths,
        block_table=table,
        scale=softmax_scale,
        window=(open_sides(window_size)[0], -1),
        softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
    )
    return out.transpose(1, 2)


def _lengths(
    cache_seqlens: int | Tensor | None, seqlen_new: int, capacity: int, q: Tensor
) -> Tensor:
    """Int[batch], the tokens in the cache before this call.

    Whether they leave room for the new ones is checked where the host knows them; values on a GPU
    are left there, and writing past the cache fails on the device.
    """
    if isinstance(cache_seqlens, Tensor):
        check.shape(_FUNCTION, "cache_seqlens", cache_seqlens, q.shape[:1], "batch")
        _check_integers("cache_seqlens", cache_seqlens, q)
        lengths = cache_seqlens
        on_host = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        known = lengths.tolist() if on_host else []
    else:
        length = capacity if cache_seqlens is None else cache_seqlens
        lengths = torch.full(q.shape[:1], length, dtype=torch.int32, device=q.device)
        known = [length]
    fits = all(0 <= length <= capacity - seqlen_new for length in known)
    rule = f"be in [0, {capacity} - {seqlen_new}], the capacity less the tokens of k"
    check.require(fits, _FUNCTION, "cache_seqlens", rule, known)
    return lengths


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    by_row: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Turn k by the angles from ``starts`` on; q likewise, or all by that of ``starts``."""

    def turn(query: Tensor, key: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        positions = starts[:, None] + rows  # [batch seqlen]
        query, key = ops.rotary(
            query.transpose(1, 2),
            key.transpose(1, 2),
            cos[positions],
            sin[positions],
            interleaved=interleaved,
        )
        return query.transpose(1, 2), key.transpose(1, 2)

    rows_q, rows_k = (torch.arange(t.shape[1], device=t.device) for t in (q, k))
    if len(rows_q) == len(rows_k) and (by_row or len(rows_q) == 1):
        return turn(q, k, rows_k)
    q, _ = turn(q, q[:, :, :0], rows_q if by_row else torch.zeros_like(rows_q))
    k, _ = turn(k, k[:, :, :0], rows_k)
    return q, k


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, starts: Tensor, table: Tensor | None
) -> None:
    batch, seqlen_new = k.shape[:2]
    rows = starts.long()[:, None] + torch.arange(seqlen_new, device=k.device)
    if table is None:
        pages = torch.arange(batch, device=k.device)[:, None]
    else:
        page_size = k_cache.shape[1]
        pages, rows = table.long().gather(1, rows // page_size), rows % page_size
    k_cache[pages, rows] = k
    v_cache[pages, rows] = v


def _dense(cache: Tensor, table: Tensor | None, q: Tensor) -> Tensor:
    """[batch capacity nheads_k headdim]: a view, or what the pages in ``table`` hold."""
    if table is None:
        return cache[: q.shape[0]]
    # numbers of pages that are not used yet may be anything
    pages = table.long().clamp(0, cache.shape[0] - 1)
    return cache[pages].flatten(1, 2)


def _only_valid(value: Tensor, starts: Tensor | None, lengths: Tensor) -> Tensor:
    """Zeros outside of starts:lengths, where a cache may hold NaN, and 0 NaN = NaN."""
    rows = torch.arange(value.shape[1], device=value.device)
    outside = rows >= lengths[:, None]
    if starts is not None:
        outside = outside | (rows < starts[:, None])
    return value.masked_fill(outside[:, :, None, None], 0.0)


def _check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> None:
    check.floating(_FUNCTION, q=q, k_cache=k_cache, v_cache=v_cache)
    check.same_dtype(_FUNCTION, q=q, k_cache=k_cache, v_cache=v_cache)
    for argument, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        rule = "have 4 dimensions"
        check.require(tensor.dim() == 4, _FUNCTION, argument, rule, tuple(tensor.shape))
    batch = q.shape[0]
    expected = (*k_cache.shape[:3], q.shape[3])
    check.shape(_FUNCTION, "k_cache", k_cache, expected, "batch_cache capacity nheads_k headdim")
    expected = (*k_cache.shape[:3], v_cache.shape[3])
    check.shape(_FUNCTION, "v_cache", v_cache, expected, "batch_cache capacity nheads_k headdim_v")
    for argument, indices in (
        ("cache_batch_idx", cache_batch_idx),
        ("cache_leftpad", cache_leftpad),
    ):
        if indices is not None:
            check.shape(_FUNCTION, argument, indices, (batch,), "batch")
            _check_integers(argument, indices, q)
    if block_table is not None:
        rule = "be None with block_table"
        check.require(cache_batch_idx is None, _FUNCTION, "cache_batch_idx", rule, "a tensor")
        valid = block_table.dim() == 2 and block_table.shape[0] == batch
        rule = f"have shape (batch max_pages) = ({batch}, any)"
        check.require(valid, _FUNCTION, "block_table", rule, tuple(block_table.shape))
        _check_integers("block_table", block_table, q)
    elif cache_batch_idx is None:
        rule = f"have at least q's {batch} rows without cache_batch_idx"
        check.require(k_cache.shape[0] >= batch, _FUNCTION, "k_cache", rule, k_cache.shape[0])


def _check_new(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    capacity: int,
) -> None:
    check.require(
        (k is None) == (v is None), _FUNCTION, "v", "be given where k is, and only there", v
    )
    if k is not None and v is not None:
        check.floating(_FUNCTION, k_cache=k_cache, k=k, v=v, rotary_cos=cos, rotary_sin=sin)
        check.same_dtype(_FUNCTION, k_cache=k_cache, k=k, v=v)
        expected = (q.shape[0], *k.shape[1:2], *k_cache.shape[2:])
        check.shape(_FUNCTION, "k", k, expected, "batch seqlen_new nheads_k headdim")
        expected = (*expected[:3], v_cache.shape[3])
        check.shape(_FUNCTION, "v", v, expected, "batch seqlen_new nheads_k headdim_v")
    rule = "be given where rotary_cos is, and only there"
    check.require((cos is None) == (sin is None), _FUNCTION, "rotary_sin", rule, sin)
    if cos is not None:
        check.require(k is not None, _FUNCTION, "k", "be given with rotary_cos", None)
        rule = f"have a row for each of the capacity's {capacity} positions"
        check.require(len(cos) >= capacity, _FUNCTION, "rotary_cos", rule, len(cos))


def _check_heads(q: Tensor, k_cache: Tensor, alibi_slopes: Tensor | None) -> None:
    heads, heads_k = q.shape[2], k_cache.shape[2]
    valid = heads == 0 if heads_k == 0 else heads % heads_k == 0
    rule = "be a multiple of the cache's heads"
    check.require(valid, _FUNCTION, "heads of q", rule, f"{heads} and {heads_k}")
    if alibi_slopes is not None and alibi_slopes.shape != (heads,):
        expected = (q.shape[0], heads)
        check.shape(_FUNCTION, "alibi_slopes", alibi_slopes, expected, "batch nheads")


def _check_integers(argument: str, tensor: Tensor, q: Tensor) -> None:
    valid = tensor.dtype in (torch.int32, torch.int64)
    check.require(valid, _FUNCTION, argument, "be int32 or int64", tensor.dtype)
    on_device = tensor.device == q.device
    check.require(on_device, _FUNCTION, argument, f"be on {q.device}, as q is", tensor.device)
