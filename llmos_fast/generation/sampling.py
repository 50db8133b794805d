"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; penalty, temperature and filters apply in this order.

    temperature: divides the logits; 0 takes the most likely token
    top_k:       keep this many tokens; 0 keeps all
    top_p:       keep the most likely tokens that together have at least this probability
    min_p:       keep the tokens that have at least this share of the most likely one's probability
    repetition_penalty: divides positive and multiplies negative logits of tokens that occurred
                 (Keskar et al. 2019, arXiv 1909.05858); 1 changes nothing

    Raises ValueError that names the field, its rule and its value.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"Sampling: temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling: min_p must be in 0..1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"Sampling: repetition_penalty must be positive, got {self.repetition_penalty}"
            )


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


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """``logits: Float[... ntoken]`` with -inf below ``p`` of the largest probability."""
    if p == 0:
        return logits
    probabilities = logits.softmax(-1)
    dropped = probabilities < p * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(dropped, -torch.inf)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """``logits: Float[... ntoken]`` with less for the tokens where ``seen: Bool`` is True."""
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalized, logits)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What ``sample`` draws from: Float[... ntoken] -> Float32[... ntoken]; temperature not 0."""
    # Probabilities of thousands of tokens need more than 16 bits.
    scaled = logits.float() / sampling.temperature
    kept = keep_top_p(keep_top_k(scaled, sampling.top_k), sampling.top_p)
    return keep_min_p(kept, sampling.min_p).softmax(-1)


def most_likely(logits: Tensor) -> Tensor:
    """Index of the largest of each row, the first of equals: Float[... ntoken] -> Int[... 1]."""
    if logits.is_cpu and logits.dtype == torch.float32:
        # of 50,257 numbers: 6 us, torch's 70
        return torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))
    return logits.argmax(-1, keepdim=True)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row.

    logits:  Float[batch ntoken], penalized already; -inf is never drawn
    returns: Int[batch 1]
    """
    if sampling.temperature == 0:
        return most_likely(logits)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)
