"""The definition of attention that also returns its probabilities, in the steps of attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmos_fast.reference.attention import probabilities, weighted_values


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(
    *, query: Tensor, value: Tensor, average_heads: bool, **scores: Any
) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.attention_weights; ``scores`` are the arguments of ``probabilities``."""
    weights, _ = probabilities(query=query, **scores)
    out = weighted_values(weights, value)
    weights = weights.mean(1) if average_heads else weights
    return out.to(query.dtype), weights.to(query.dtype)
