"""The public functions of flash-attn 2.8 (Dao 2023, arXiv:2307.08691) on this package's ops.

Names, argument order, defaults, layouts and meaning are flash-attn's, so that

    from llmos_fast.compat import flash_attn

serves code that says ``import flash_attn``. Throughout, query i stands at position
p = i + seqlen_k - seqlen_q among the keys, also where not causal, and a row without keys gives 0.

Beyond flash-attn: CPU tensors, fp32 and fp64, every headdim, and a headdim of v unlike that of q.
Bad input raises ValueError, with the name that the argument has here or in ``ops.attention``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast import ops
from llmos_fast.compat.alignment import aligned_attention, needs_shift, open_sides
from llmos_fast.compat.kv_cache import flash_attn_with_kvcache
from llmos_fast.ops import check

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of a batch whose sequences have one length.

    Args:
        q: Float[batch seqlen_q nheads headdim], any strides.
        k: Float[batch seqlen_k nheads_k headdim]; nheads is a multiple of nheads_k, and head h of
            q reads head h // (nheads / nheads_k).
        v: Float[batch seqlen_k nheads_k headdim_v].
        dropout_p: chance that a probability is dropped, by the bits of ``ops.attention``.
        softmax_scale: default headdim ** -0.5.
        causal: hides the keys j > p.
        window_size: (left, right) hides all keys but p - left <= j <= p + right; a negative side
            is open.
        softcap: above 0, a score s becomes softcap tanh(s / softcap).
        alibi_slopes: Float[nheads] or Float[batch nheads]; adds -slope |p - j| to the scores.
        deterministic: accepted; the backward pass always is.
        return_attn_probs: return (out, softmax_lse, None). The probabilities, which flash-attn
            returns for its own tests, are never held in memory.

    Returns:
        out: Float[batch seqlen_q nheads headdim_v] in q's dtype.
        softmax_lse: with ``return_attn_probs`` only, Float32[batch nheads seqlen_q], the
        log-sum-exp of the scores; -inf for a row without keys, where flash-attn writes +inf. It
        has a gradient.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        rule = "have 4 dimensions (batch seqlen nheads headdim)"
        check.require(tensor.dim() == 4, "flash_attn_func", argument, rule, tuple(tensor.shape))
    out, lse = aligned_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=softmax_scale,
        dropout_p=dropout_p,
    )
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` with kv: Float[batch seqlen_k 2 nheads_k headdim] for k and v."""
    k, v = _unpack("flash_attn_kvpacked_func", "kv", kv, 2, "batch seqlen 2 nheads_k headdim")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_func`` with qkv: Float[batch seqlen 3 nheads headdim] for q, k and v."""
    q, k, v = _unpack("flash_attn_qkvpacked_func", "qkv", qkv, 3, "batch seqlen 3 nheads headdim")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of packed sequences.

    Sequence b attends from rows cu_seqlens_q[b]:cu_seqlens_q[b + 1] of q to rows
    cu_seqlens_k[b]:cu_seqlens_k[b + 1] of k and v; rows of q past the last sequence give 0.

    One call of ``ops.attention``, except that slopes per sequence, and a window or ALiBi without
    ``causal`` where the lengths of queries and keys differ, take a call per sequence and read the
    lengths on the host.

    Args:
        q: Float[total_q nheads headdim], any strides.
        k: Float[total_k nheads_k headdim].
        v: Float[total_k nheads_k headdim_v].
        cu_seqlens_q: Int[batch + 1], rising from 0.
        cu_seqlens_k: likewise.
        max_seqlen_q: length of the longest sequence of queries.
        max_seqlen_k: likewise of keys.
        dropout_p: as for ``flash_attn_func``.
        softmax_scale: likewise.
        causal: likewise.
        window_size: likewise.
        softcap: likewise.
        alibi_slopes: likewise.
        deterministic: likewise.
        return_attn_probs: likewise.
        block_table: Int[batch max_pages]: k and v are then pages, Float[num_pages page_size
            nheads_k headdim], and key t of sequence b is row t % page_size of page
            block_table[b, t // page_size]. They are gathered first, which reads the number of keys
            on the host.

    Returns:
        out: Float[total_q nheads headdim_v] in q's dtype.
        softmax_lse: Float32[nheads total_q], likewise with ``return_attn_probs`` only.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, block_table)
    if block_table is not None:
        k, v = _gather_pages(k, v, cu_seqlens_k, block_table)
    slopes_differ = alibi_slopes is not None and alibi_slopes.dim() == 2 and len(alibi_slopes) > 1
    if slopes_differ or (
        needs_shift(causal, window_size, alibi_slopes)
        and cu_seqlens_q is not cu_seqlens_k
        and not bool((cu_seqlens_q == cu_seqlens_k).all())
    ):
        out, lse = _sequence_by_sequence(
            q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), dropout_p, softmax_scale,
            causal, window_size, softcap, alibi_slopes,
        )  # fmt: skip
    else:
        left, right = open_sides(window_size)
        out, lse = ops.attention(
            q,
            k,
            v,
            causal="bottom_right" if causal else False,
            cu_seqlens=(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
            window=(left, -1 if causal else right),
            alibi_slopes=alibi_slopes,
            softcap=max(softcap, 0.0),
            dropout_p=dropout_p,
            scale=softmax_scale,
            return_lse=True,
        )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` with kv: Float[total_k 2 nheads_k headdim] for k and v."""
    k, v = _unpack("flash_attn_varlen_kvpacked_func", "kv", kv, 2, "total 2 nheads_k headdim")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``flash_attn_varlen_func`` with qkv: Float[total 3 nheads headdim] for q, k and v."""
    q, k, v = _unpack("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, "total 3 nheads headdim")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _unpack(
    function: str, argument: str, packed: Tensor, count: int, names: str
) -> tuple[Tensor, ...]:
    """Views of what is stacked in the third dimension from the end."""
    valid = packed.dim() == len(names.split()) and packed.shape[-3] == count
    check.require(valid, function, argument, f"have shape ({names})", tuple(packed.shape))
    return packed.unbind(-3)


def _check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None,
) -> None:
    function, packed = "flash_attn_varlen_func", "total nheads headdim"
    kv_names = packed if block_table is None else "num_pages page_size nheads_k headdim"
    for argument, tensor, names in (("q", q, packed), ("k", k, kv_names), ("v", v, kv_names)):
        dims = len(names.split())
        rule = f"have {dims} dimensions ({names})"
        check.require(tensor.dim() == dims, function, argument, rule, tuple(tensor.shape))
    check.shape(function, "v", v, (*k.shape[:-1], v.shape[-1]), "that of k, but for headdim_v")
    batch = cu_seqlens_q.numel() - 1
    for argument, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check.shape(function, argument, tensor, (batch + 1,), "batch + 1")
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        expected = (batch, q.shape[1])
        check.shape(function, "alibi_slopes", alibi_slopes, expected, "batch nheads")
    if block_table is not None:
        valid = block_table.dim() == 2 and block_table.shape[0] == batch
        rule = f"have shape (batch max_pages) = ({batch}, any)"
        check.require(valid, function, "block_table", rule, tuple(block_table.shape))


def _gather_pages(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed k and v, [total_k nheads_k headdim], out of their pages."""
    page_size = k.shape[1]
    rows = torch.arange(int(cu_seqlens_k[-1]), device=k.device)
    sequence = torch.searchsorted(cu_seqlens_k[1:], rows, right=True)
    position = rows - cu_seqlens_k[sequence]
    page = block_table[sequence, position // page_size].long()
    return k[page, position % page_size], v[page, position % page_size]


def _sequence_by_sequence(
    q: Tensor, k: Tensor, v: Tensor, starts_q: list[int], starts_k: list[int], dropout_p: float,
    softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of packed sequences, each with a shift, and slopes where given, of its own."""
    for argument, starts, total in (("q", starts_q, len(q)), ("k", starts_k, len(k))):
        valid = starts[:1] == [0] and starts == sorted(starts) and starts[-1] <= total
        rule = f"rise from 0 to at most {total}"
        check.require(valid, "flash_attn_varlen_func", f"cu_seqlens_{argument}", rule, starts)
    outs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows_q, rows_k = (slice(*starts[b : b + 2]) for starts in (starts_q, starts_k))
        query, key, value = (t.transpose(0, 1)[None] for t in (q[rows_q], k[rows_k], v[rows_k]))
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        out, lse = aligned_attention(
            query,
            key,
            value,
            causal=causal,
            window_size=window_size,
            alibi_slopes=slopes,
            softcap=softcap,
            scale=softmax_scale,
            dropout_p=dropout_p,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = len(q) - starts_q[-1]
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return F.pad(out, (0, 0, 0, 0, 0, rest)), F.pad(lse, (0, rest), value=-torch.inf)
