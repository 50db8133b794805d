"""Several tokens per pass of the model, with the output that one token per pass would give.

Somebody who is cheap to ask proposes tokens; the model computes the logits after all of them in one
pass, and each is accepted with the probability that makes the result the model's own.

Source: Leviathan et al. 2023 (arXiv 2211.17192); proposals from the prompt: Saxena 2023.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmos_fast.generation.decoder import CachedDecoder
from llmos_fast.generation.generate import check_prompts
from llmos_fast.generation.sampling import GREEDY, Sampling, most_likely, probabilities
from llmos_fast.models import CausalLM


@dataclass(frozen=True)
class Proposal:
    """Tokens to come, and for each the distribution it was drawn from, Float[count ntoken].

    ``drawn_from`` is None where a token was certain to be proposed.
    """

    tokens: list[int]
    drawn_from: Tensor | None = None


class Proposer(Protocol):
    """Proposes how a text goes on."""

    def propose(self, tokens: list[int], count: int) -> Proposal:
        """Up to ``count`` tokens after ``tokens``, which go on from those of the last call."""
        ...


class PromptLookup:
    """What followed the last time that the last tokens occurred.

    longest, shortest: tokens that must agree; more are tried first
    """

    def __init__(self, longest: int = 4, shortest: int = 2):
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"PromptLookup: shortest must be in 1..longest = {longest}, got {shortest}"
            )
        self._sizes = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram: where what followed it begins
        self._known = 0

    def propose(self, tokens: list[int], count: int) -> Proposal:
        """See ``Proposer``."""
        for end in range(self._known + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._known = max(self._known, len(tokens) - 1)
        for size in self._sizes:
            start = self._after.get(tuple(tokens[-size:]))
            if start is not None:
                return Proposal(tokens[start : start + count])
        return Proposal([])


class DraftModel:
    """A smaller model of the same vocabulary, drawing as the large one will."""

    def __init__(self, model: CausalLM, sampling: Sampling = GREEDY, seed: int = 0):
        self._decoder = CachedDecoder(model.eval())
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed + 1)

    def propose(self, tokens: list[int], count: int) -> Proposal:
        """See ``Proposer``."""
        limit = self._decoder.max_length
        if limit is not None:
            # no pass reads the last proposal
            count = min(count, limit - len(tokens) + 1)
        if count < 1:
            return Proposal([])
        logits = self._decoder.read([tokens])[0].cpu()
        proposed: list[int] = []
        drawn_from = []
        while True:
            if self._sampling.temperature == 0:
                proposed.append(int(most_likely(logits)))
            else:
                drawn_from.append(probabilities(logits, self._sampling))
                proposed.append(
                    int(torch.multinomial(drawn_from[-1], 1, generator=self._generator))
                )
            if len(proposed) == count:
                return Proposal(proposed, torch.stack(drawn_from) if drawn_from else None)
            last = torch.tensor([proposed[-1:]], device=self._decoder.cache.device)
            logits = self._decoder.step(last)[0, -1].cpu()


@dataclass
class Acceptance:
    """How well proposals did: ``passes`` of the model gave ``tokens``."""

    passes: int = 0
    tokens: int = 0


@torch.no_grad()
def speculate(
    model: CausalLM,
    prompt: Sequence[int],
    length: int,
    proposer: Proposer,
    *,
    draft_tokens: int = 7,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    cache_dtype: torch.dtype | None = None,
    acceptance: Acceptance | None = None,
) -> Iterator[int]:
    """The tokens after ``prompt``, as ``stream`` gives them, several from each pass of the model.

    draft_tokens: proposals per pass, at most
    acceptance:   is filled with what happened

    Greedy tokens are those of ``stream``; drawn ones have its distribution, but other tokens for a
    seed. Raises ValueError for a repetition penalty, which each token would change.
    """
    decoder = CachedDecoder(model.eval(), cache_dtype)
    check_prompts([prompt], length, decoder.max_length)
    if draft_tokens < 1:
        raise ValueError(f"speculate: draft_tokens must be at least 1, got {draft_tokens}")
    if sampling.repetition_penalty != 1:
        raise ValueError(
            f"speculate: repetition_penalty must be 1, got {sampling.repetition_penalty}"
        )
    if length == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    accepted = _accept(decoder.read([tokens]).cpu(), Proposal([]), sampling, generator)
    counts = acceptance if acceptance is not None else Acceptance()
    while True:
        counts.passes += 1
        for token in accepted:
            if token in stop_ids:
                return
            counts.tokens += 1
            tokens.append(token)
            yield token
            if len(tokens) == len(prompt) + length:
                return
        room = len(prompt) + length - len(tokens) - 1
        proposal = proposer.propose(tokens, min(draft_tokens, room)) if room else Proposal([])
        read = torch.tensor([[tokens[-1], *proposal.tokens]], device=decoder.cache.device)
        logits = decoder.step(read)[0].cpu()
        accepted = _accept(logits, proposal, sampling, generator)
        # the cache keeps what stands: all tokens but the last, which no pass has read
        decoder.rewind([len(tokens) + len(accepted) - 1])


def _accept(
    logits: Tensor, proposal: Proposal, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """The proposals that stand, and one token more.

    logits: Float[count + 1 ntoken], after the last certain token and after each proposal
    """
    if sampling.temperature == 0:
        best: list[int] = most_likely(logits)[:, 0].tolist()
        right = 0
        while right < len(proposal.tokens) and proposal.tokens[right] == best[right]:
            right += 1
        return best[: right + 1]
    wanted = probabilities(logits, sampling)
    accepted: list[int] = []
    for i, token in enumerate(proposal.tokens):
        drawn = proposal.drawn_from
        offered = 1.0 if drawn is None else float(drawn[i, token])
        if float(torch.rand((), generator=generator)) * offered < float(wanted[i, token]):
            accepted.append(token)
            continue
        # what the proposals gave too little of
        if drawn is None:
            rest = wanted[i].index_fill(0, torch.tensor([token]), 0.0)
        else:
            rest = (wanted[i] - drawn[i]).clamp(min=0)
        return [*accepted, int(torch.multinomial(rest, 1, generator=generator))]
    return [*accepted, int(torch.multinomial(wanted[-1], 1, generator=generator))]
