"""The most likely continuation that a search over several at a time finds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from llmos_fast.generation.decoder import Decoder
from llmos_fast.generation.generate import check_prompts


@dataclass(frozen=True)
class Hypothesis:
    """A continuation; ``score`` is its log-probability over a power of its length."""

    tokens: list[int]
    score: float


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    prompt: Sequence[int],
    length: int,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    stop_ids: Collection[int] = (),
) -> list[Hypothesis]:
    """Up to ``beams`` continuations of up to ``length`` tokens, the best first.

    length_penalty: exponent of the length that a sum of log-probabilities is divided by; above 0
        favours long continuations, below 0 short ones
    stop_ids: tokens that end a continuation; they count as its last one

    The search ends where no open continuation can still be better than the worst finished one.
    Source: as transformers' ``generate(num_beams=...)``, ``early_stopping=False``.
    """
    check_prompts([prompt], length, decoder.max_length)
    if beams < 1:
        raise ValueError(f"beam_search: beams must be at least 1, got {beams}")
    if length == 0:
        return []
    logits = decoder.read([list(prompt)])
    decoder.keep([0] * beams)
    scores = torch.full((beams,), -torch.inf)
    scores[0] = 0.0  # the beams are one and the same at first
    logits = logits.expand(beams, -1)
    open_beams: list[list[int]] = [[] for _ in range(beams)]
    finished: list[Hypothesis] = []
    vocabulary = logits.shape[-1]
    for step in range(1, length + 1):
        totals = scores[:, None] + logits.float().log_softmax(-1).cpu()
        # of twice as many, at least ``beams`` go on, unless more than one token ends a text
        count = min((1 + max(1, len(stop_ids))) * beams, totals.numel())
        best, where = totals.flatten().topk(count)
        going_on: list[tuple[float, int, int]] = []
        for rank, (total, index) in enumerate(zip(best.tolist(), where.tolist(), strict=True)):
            if total == -torch.inf:
                break  # there are fewer texts than beams
            beam, token = divmod(index, vocabulary)
            if token in stop_ids:
                if rank < beams:
                    tokens = [*open_beams[beam], token]
                    finished.append(Hypothesis(tokens, total / step**length_penalty))
            elif len(going_on) < beams:
                going_on.append((total, beam, token))
        finished = sorted(finished, key=lambda h: -h.score)[:beams]
        open_beams = [[*open_beams[beam], token] for _, beam, token in going_on]
        scores = torch.tensor([total for total, _, _ in going_on])
        attainable = max(scores.tolist(), default=-torch.inf) / step**length_penalty
        enough = len(finished) == beams and finished[-1].score >= attainable
        done = enough or not going_on
        if done or step == length:
            break
        decoder.keep([beam for _, beam, _ in going_on])
        device = logits.device
        tokens_now = torch.tensor([[token] for _, _, token in going_on], device=device)
        logits = decoder.step(tokens_now)[:, -1]
    if not done:
        for tokens, total in zip(open_beams, scores.tolist(), strict=True):
            finished.append(Hypothesis(tokens, total / len(tokens) ** length_penalty))
    return sorted(finished, key=lambda h: -h.score)[:beams]
