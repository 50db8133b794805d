"""Attention that also returns its probabilities: the one product that has to hold all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast import ops
from llmos_fast.nn.masks import Masks, visible_pairs


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    window: tuple[int, int] | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """As ops.attention, with the probabilities after dropout, as torch.nn returns them.

    Args:
        query: Float[batch heads_q seq_q head_dim].
        key: Float[batch heads_kv seq_k head_dim].
        value: Float[batch heads_kv seq_k head_dim].
        masks: not packed.
        window: as ops.attention.
        dropout_p: as ops.attention.

    Returns:
        (out, weights): Float[batch heads_q seq_q head_dim], Float[batch heads_q seq_q seq_k]; zeros
        in both for a query that may attend to nothing.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if masks.bias is not None:
        scores = scores + masks.bias.to(scores.dtype)
    scores = scores.masked_fill(~visible_pairs(masks, window, query, key.shape[2]), -torch.inf)
    # softmax of a row of -inf is NaN
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    weights = ops.dropout(weights, dropout_p)
    return weights.to(value.dtype) @ value, weights
