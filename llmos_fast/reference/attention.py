"""The definition of attention: the whole score matrix, softmax, the product with the values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmos_fast.dropout import dropout_factor
from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: str,
    key_lengths: Tensor | None,
    packed: Any,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See llmos_fast.ops.attention; packed sequences are one batch whose mask keeps them apart."""
    if packed is not None:
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    weights, lse = probabilities(
        query=query,
        key=key,
        mask=mask,
        bias=bias,
        causal=causal,
        key_lengths=key_lengths,
        packed=packed,
        window=window,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
        scale=scale,
    )
    out = weighted_values(weights, value).to(query.dtype)
    if packed is not None:
        out, lse = out.squeeze(0).transpose(0, 1), lse.squeeze(0)
    return (out, lse) if return_lse else out


def probabilities(
    *,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: str,
    key_lengths: Tensor | None,
    packed: Any,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Float[batch heads_q seq_q seq_k] after dropout, and their log-sum-exp."""
    position_q, position_k, shift, allowed = _positions(query, key, causal, key_lengths, packed)
    distance = position_k - (position_q + shift)  # [batch or 1, 1, seq_q, seq_k]
    left, right = window
    if causal:
        allowed = allowed & (distance <= 0)
    if left >= 0:
        allowed = allowed & (distance >= -left)
    if right >= 0:
        allowed = allowed & (distance <= right)
    if mask is not None:
        allowed = allowed & mask

    key = _repeated(key, query.shape[1])
    scores = upcast(query) @ upcast(key).transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    scores = scores.masked_fill(~allowed, -torch.inf)

    weights, lse = _softmax(scores, sinks)
    if seed is not None:
        weights = weights * _dropout(weights, seed, dropout_p, position_k)
    return weights, lse


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Float[batch heads_q seq_q head_dim_v] of Float[batch heads_kv seq_k head_dim_v]."""
    value = upcast(_repeated(value, weights.shape[1]))
    return weights.to(value.dtype) @ value


def _repeated(x: Tensor, heads_q: int) -> Tensor:
    """Key or value heads, each as often as query heads share it."""
    group = heads_q // max(x.shape[1], 1)
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _positions(
    query: Tensor, key: Tensor, causal: str, key_lengths: Tensor | None, packed: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions within their sequences, the shift between the two, and which keys exist."""
    seq_q, seq_k, device = query.shape[2], key.shape[2], query.device
    index_q = torch.arange(seq_q, device=device)[:, None]
    index_k = torch.arange(seq_k, device=device)
    shift = torch.zeros((), dtype=torch.int64, device=device)
    if packed is not None:
        cu_q, cu_k = packed.cu_seqlens_q.long(), packed.cu_seqlens_k.long()
        sequence_q = torch.searchsorted(cu_q[1:], index_q, right=True)
        sequence_k = torch.searchsorted(cu_k[1:], index_k, right=True)
        if causal == "bottom_right":
            shift = (cu_k.diff() - cu_q.diff())[sequence_q]
        allowed = sequence_q == sequence_k
        return index_q - cu_q[sequence_q], index_k - cu_k[sequence_k], shift, allowed
    lengths = torch.full((1, 1, 1, 1), seq_k, device=device)
    if key_lengths is not None:
        lengths = key_lengths.long().clamp(0, seq_k).view(-1, 1, 1, 1)
    if causal == "bottom_right":
        shift = lengths - seq_q
    return index_q, index_k, shift, index_k < lengths


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities, and the log-sum-exp without the sink; a row of -inf gives 0 and -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf, dtype=_lse_dtype(scores))
    maximum = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        sinks = upcast(sinks).view(-1, 1, 1).to(scores.dtype)
        maximum = torch.maximum(maximum, sinks.detach())
    # a row of -inf would give -inf - -inf = NaN
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    lse = (safe.log() + maximum).masked_fill(empty, -torch.inf).squeeze(-1).to(_lse_dtype(scores))
    return weights / (safe if sinks is None else safe + torch.exp(sinks - maximum)), lse


def _lse_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _dropout(weights: Tensor, seed: Tensor, dropout_p: float, position_k: Tensor) -> Tensor:
    batch, heads, seq_q, _ = weights.shape
    rows = torch.arange(batch * heads * seq_q, device=seed.device).view(batch, heads, seq_q, 1)
    return dropout_factor(seed, dropout_p, rows, position_k).to(weights.dtype)
