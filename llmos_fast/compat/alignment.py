"""flash-attn's alignment in the terms of ops.attention: the last query meets the last key.

With ``causal=False`` ops.attention counts distances from the first query and the first key, so the
window and the ALiBi distance have to carry the shift between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmos_fast import ops


class Scores(NamedTuple):
    """What may be attended to and what is added to the scores, as ops.attention takes it."""

    causal: bool | str = False
    window: tuple[int, int] = (-1, -1)
    alibi_slopes: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None


def open_sides(window_size: tuple[int, int]) -> tuple[int, int]:
    """Every negative side of a window means that it is open; ops.attention writes -1 for that."""
    left, right = window_size
    return max(left, -1), max(right, -1)


def needs_shift(causal: bool, window_size: tuple[int, int], alibi_slopes: Tensor | None) -> bool:
    """Whether a difference between the lengths changes what ops.attention has to be told."""
    return not causal and (open_sides(window_size) != (-1, -1) or alibi_slopes is not None)


def aligned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    window_size: tuple[int, int],
    alibi_slopes: Tensor | None,
    softcap: float,
    scale: float | None,
    dropout_p: float = 0.0,
    key_starts: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ops.attention with query i at position i + (number of keys) - seq_q.

    Args:
        query: Float[batch heads_q seq_q head_dim].
        key: Float[batch heads_kv seq_k head_dim].
        value: Float[batch heads_kv seq_k head_dim_v].
        causal: keys after the query's position are hidden; closes the window's right side.
        window_size: (left, right); a negative side is open.
        alibi_slopes: Float[heads_q] or Float[batch heads_q].
        softcap: 0 or less switches it off.
        scale: default head_dim ** -0.5.
        dropout_p: chance that a probability is dropped.
        key_starts: Int[batch]; keys before this position are hidden, and keep their positions.
        key_lengths: Int[batch]; keys from this position on are hidden; default seq_k.
    """
    scores = _scores(query, key, causal, open_sides(window_size), alibi_slopes, key_lengths)
    mask = scores.mask
    if key_starts is not None:
        exists = torch.arange(key.shape[2], device=key.device) >= key_starts.view(-1, 1, 1, 1)
        mask = exists if mask is None else mask & exists
    return ops.attention(  # type: ignore[return-value]
        query,
        key,
        value,
        mask=mask,
        bias=scores.bias,
        causal=scores.causal,
        key_lengths=key_lengths,
        window=scores.window,
        alibi_slopes=scores.alibi_slopes,
        softcap=max(softcap, 0.0),
        dropout_p=dropout_p,
        scale=scale,
        return_lse=True,
    )


def _scores(
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
) -> Scores:
    left, right = window
    if causal:
        return Scores("bottom_right", (left, -1), alibi_slopes)
    seq_q, seq_k = query.shape[2], key.shape[2]
    if not needs_shift(causal, window, alibi_slopes) or (key_lengths is None and seq_q == seq_k):
        return Scores(window=window, alibi_slopes=alibi_slopes)
    if key_lengths is None and alibi_slopes is None:
        shift = seq_k - seq_q
        shifted = (left - shift if left >= 0 else -1, right + shift if right >= 0 else -1)
        # a closed side that the shift moves past the diagonal has no spelling as a window
        if (left < 0 or shifted[0] >= 0) and (right < 0 or shifted[1] >= 0):
            return Scores(window=shifted)
    return _explicit_scores(query, key, window, alibi_slopes, key_lengths)


def _explicit_scores(
    query: Tensor,
    key: Tensor,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
) -> Scores:
    """The window as a mask [... seq_q seq_k], ALiBi as a bias [... heads_q seq_q seq_k]."""
    seq_q, seq_k, device = query.shape[2], key.shape[2], query.device
    index_q = torch.arange(seq_q, device=device)[:, None]
    index_k = torch.arange(seq_k, device=device)
    length = seq_k if key_lengths is None else key_lengths.view(-1, 1, 1, 1)
    distance = index_k - index_q - (length - seq_q)
    mask = None
    if window != (-1, -1):
        farthest = seq_q + seq_k
        left, right = (farthest if side < 0 else side for side in window)
        mask = (distance >= -left) & (distance <= right)
    bias = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(torch.promote_types(query.dtype, torch.float32))
        bias = -slopes[..., None, None] * distance.abs()
    return Scores(mask=mask, bias=bias)
