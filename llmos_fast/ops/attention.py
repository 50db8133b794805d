"""softmax(query key^T) value, with everything that models have put between the two products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.dropout import draw_seed
from llmos_fast.ops import check

implementations("attention", "native", "triton")

_OP = "attention"


class PackedLengths(NamedTuple):
    """Where packed sequences begin; ``cu_seqlens_*`` are Int32[sequences + 1], from 0."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1), computed without the score matrix.

        s = scale q k^T;  s = softcap tanh(s / softcap);  s += bias - slope |k_pos - q_pos|
        out = dropout(softmax(s over the keys that may be attended to)) value

    A row that may attend to nothing gives 0 and zero gradients, never NaN. Query i stands at
    position i + shift among the keys; shift is (number of keys) - seq_q where ``causal`` is
    "bottom_right", counting ``key_lengths`` where given, and 0 otherwise.

    Args:
        query: Float[batch heads_q seq_q head_dim], any strides.
        key: Float[batch heads_kv seq_k head_dim]; heads_q is a multiple of heads_kv, and query
            head h reads key head h // (heads_q / heads_kv).
        value: Float[batch heads_kv seq_k head_dim_v].
        mask: Bool, broadcastable to [batch heads_q seq_q seq_k]; True = may be attended to.
        bias: Float, broadcastable likewise, added to the scores; has a gradient.
        causal: keys after the query's position are hidden. True is "top_left", as in
            F.scaled_dot_product_attention; "bottom_right" as in flash-attention and KV caches.
        key_lengths: Int[batch]; keys from this position on are hidden.
        cu_seqlens: (cu_q, cu_k, max_q, max_k) for packed sequences: query is then
            Float[total_q heads_q head_dim], key and value Float[total_k heads_kv ...], and
            sequence b attends from rows cu_q[b]:cu_q[b + 1] to rows cu_k[b]:cu_k[b + 1].
            Excludes mask, bias and key_lengths.
        window: (left, right): keys farther than that from the query's position are hidden;
            -1 leaves a side open (Beltagy et al. 2020).
        alibi_slopes: Float[heads_q] or Float[batch heads_q] (Press et al. 2022).
        softcap: tanh limit of the scores; 0 switches it off (Gemma 2).
        sinks: Float[heads_q], one more logit per head that takes probability and gives no value;
            has a gradient (Xiao et al. 2024, gpt-oss).
        dropout_p: probabilities are dropped with this chance, by bits keyed on
            row (batch heads_q + head) seq_q + query, column key (see llmos_fast.dropout); for
            packed sequences row head total_q + query, column = position in the sequence.
        scale: default head_dim ** -0.5.
        return_lse: also return log(sum(exp(s))) over the attended keys, without the sink.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        out: Float[batch heads_q seq_q head_dim_v] in query's dtype (packed: [total_q heads_q
        head_dim_v]), and with ``return_lse`` also lse: Float32[batch heads_q seq_q] (float64 for
        float64; packed: [heads_q total_q]), -inf where nothing is attended to.

    Gradients: query, key, value, bias, sinks, from ``out`` and ``lse``. Under autocast the tensors
    are cast as for torch's own products.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    call = validated(
        _OP,
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
        window=window,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        scale=scale,
    )
    return select(_OP, impl, **call, return_lse=return_lse)  # type: ignore[no-any-return]


def validated(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool | str,
    key_lengths: Tensor | None,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> dict[str, Any]:
    """What an implementation of ``op`` is called with: checked, cast, with defaults and a seed."""
    query, key, value = check.autocast(query, key, value)  # type: ignore[assignment]
    check.floating(op, query=query, key=key, value=value, bias=bias, sinks=sinks)
    check.same_dtype(op, query=query, key=key, value=value)
    packed = None if cu_seqlens is None else PackedLengths(*cu_seqlens)
    if packed is None:
        _check_dense(op, query, key, value, key_lengths)
        _check_scores(op, query, key, mask, bias)
    else:
        _check_packed(op, query, key, value, packed, mask, bias, key_lengths)
    heads_q = query.shape[-3] if packed is None else query.shape[1]
    check.shape(op, "sinks", sinks, (heads_q,), "heads_q")
    if alibi_slopes is not None and alibi_slopes.shape != (heads_q,):
        expected = (query.shape[0] if packed is None else 1, heads_q)
        check.shape(op, "alibi_slopes", alibi_slopes, expected, "batch heads_q")
    check.probability(op, "dropout_p", dropout_p)
    check.require(softcap >= 0.0, op, "softcap", "be at least 0", softcap)
    return {
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "bias": bias,
        "causal": _alignment(op, causal),
        "key_lengths": key_lengths,
        "packed": packed,
        "window": _window(op, window),
        "alibi_slopes": alibi_slopes,
        "softcap": float(softcap),
        "sinks": sinks,
        "dropout_p": dropout_p,
        "seed": draw_seed(dropout_p, query.device),
        "scale": query.shape[-1] ** -0.5 if scale is None else float(scale),
    }


def _alignment(op: str, causal: bool | str) -> str:
    names: dict[bool | str, str] = {False: "", True: "top_left"}
    if causal in names or causal in ("top_left", "bottom_right"):
        return names.get(causal, str(causal))
    rule = 'be False, True, "top_left" or "bottom_right"'
    raise ValueError(f"{op}: causal must {rule}, got {causal!r}")


def _window(op: str, window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return (-1, -1)
    left, right = window
    check.require(
        left >= -1 and right >= -1, op, "window", "have sides of -1 (open) or more", window
    )
    return (left, right)


def _check_dense(
    op: str, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None
) -> None:
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        check.require(tensor.dim() == 4, op, argument, "have 4 dimensions", tuple(tensor.shape))
    batch, heads_q, _, head_dim = query.shape
    _, heads_kv, seq_k, _ = key.shape
    expected = (batch, heads_kv, seq_k, head_dim)
    check.shape(op, "key", key, expected, "batch heads_kv seq_k head_dim")
    expected = (batch, heads_kv, seq_k, value.shape[3])
    check.shape(op, "value", value, expected, "batch heads_kv seq_k head_dim_v")
    _check_heads(op, heads_q, heads_kv)
    if key_lengths is not None:
        check.shape(op, "key_lengths", key_lengths, (batch,), "batch")
        _check_integers(op, "key_lengths", key_lengths)


def _check_heads(op: str, heads_q: int, heads_kv: int) -> None:
    valid = heads_q == 0 if heads_kv == 0 else heads_q % heads_kv == 0
    rule = "be a multiple of the key's heads"
    check.require(valid, op, "heads of query", rule, f"{heads_q} and {heads_kv}")


def _check_integers(op: str, argument: str, tensor: Tensor) -> None:
    valid = tensor.dtype in (torch.int32, torch.int64)
    check.require(valid, op, argument, "be int32 or int64", tensor.dtype)


def _check_scores(
    op: str, query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None
) -> None:
    scores = (*query.shape[:3], key.shape[2])
    for argument, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            continue
        broadcasts = tensor.dim() <= 4 and all(
            have in (1, want)
            for have, want in zip(reversed(tensor.shape), reversed(scores), strict=False)
        )
        rule = f"broadcast to (batch heads_q seq_q seq_k) = {scores}"
        check.require(broadcasts, op, argument, rule, tuple(tensor.shape))
    if mask is not None:
        rule = "be bool (a float mask is a bias)"
        check.require(mask.dtype == torch.bool, op, "mask", rule, mask.dtype)


def _check_packed(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedLengths,
    *excluded: Tensor | None,
) -> None:
    for argument, tensor in zip(("mask", "bias", "key_lengths"), excluded, strict=True):
        check.require(tensor is None, op, argument, "be None with cu_seqlens", "a tensor")
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        rule = "have 3 dimensions with cu_seqlens"
        check.require(tensor.dim() == 3, op, argument, rule, tuple(tensor.shape))
    expected = (*key.shape[:2], query.shape[2])
    check.shape(op, "key", key, expected, "total_k heads_kv head_dim")
    expected = (*key.shape[:2], value.shape[2])
    check.shape(op, "value", value, expected, "total_k heads_kv head_dim_v")
    _check_heads(op, query.shape[1], key.shape[1])
    lengths: dict[str, Any] = packed._asdict()
    for argument in ("cu_seqlens_q", "cu_seqlens_k"):
        _check_integers(op, argument, lengths[argument])
        expected = (packed.cu_seqlens_q.numel(),)
        check.shape(op, argument, lengths[argument], expected, "sequences + 1")
