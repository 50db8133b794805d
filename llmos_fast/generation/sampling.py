"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the three filters apply in this order.

    temperature: divides the logits; 0 takes the most likely token
    top_k:       keep this many tokens; 0 keeps all
    top_p:       keep the most likely tokens that together have at least this probability

    Raises ValueError that names the field, its rule and its value.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"Sampling: temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling(temperature=0.0)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """``logits: Float[... ntoken]`` with all but the ``k`` largest at -inf; ties are kept."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """``logits: Float[... ntoken]`` with -inf outside the smallest set of probability >= ``p``."""
    if p == 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    # What is already covered before a token: the first token is always kept.
    covered = probabilities.cumsum(-1) - probabilities
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, covered >= p)
    return logits.masked_fill(dropped, -torch.inf)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row.

    logits:  Float[batch ntoken]; -inf is never drawn
    returns: Int[batch 1]
    """
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # Probabilities of thousands of tokens need more than 16 bits.
    scaled = logits.float() / sampling.temperature
    kept = keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator)
