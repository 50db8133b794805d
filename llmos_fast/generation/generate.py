"""Text from a language model, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmos_fast.data import Tokenizer
from llmos_fast.generation.sampling import Sampling, sample
from llmos_fast.models import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    length: int,
    *,
    sampling: Sampling,
    seed: int = 0,
    context: int,
    banned: Sequence[int] = (),
) -> Tensor:
    """Continue ``prompt`` by ``length`` tokens; the model is put in evaluation mode.

    prompt:  Int[batch seq], seq >= 1
    context: tokens the model looks back
    banned:  tokens that are never produced
    returns: Int[batch seq+length], the prompt included; the same seed gives the same tokens
    """
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"generate: prompt must be [batch seq] with seq >= 1, got {tuple(prompt.shape)}"
        )
    if length < 0:
        raise ValueError(f"generate: length must be at least 0, got {length}")
    if context < 1:
        raise ValueError(f"generate: context must be at least 1, got {context}")
    model.eval()
    generator = torch.Generator(prompt.device).manual_seed(seed)
    tokens = prompt
    for _ in range(length):
        logits = _next_logits(model, tokens, context)
        logits[:, list(banned)] = -torch.inf
        tokens = torch.cat([tokens, sample(logits, sampling, generator)], dim=1)
    return tokens


def _next_logits(model: LanguageModel, tokens: Tensor, context: int) -> Tensor:
    return model.next_logits(tokens[:, -context:])


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    *,
    sampling: Sampling,
    seed: int = 0,
    context: int,
    unknown: str = "map",
    allow_unknown: bool = False,
) -> str:
    """Continue ``prompt`` by ``length`` tokens and return the prompt with its continuation.

    unknown:       words of the prompt outside the vocabulary: "map" to ``<unk>``, or "raise"
                   ValueError
    allow_unknown: whether ``<unk>`` may be produced

    An empty prompt starts at the beginning of a line.
    """
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt, unknown) or [tokenizer.end_id]
    banned = () if allow_unknown or tokenizer.unknown_id is None else (tokenizer.unknown_id,)
    tokens = generate(
        model,
        torch.tensor([ids], device=device),
        length,
        sampling=sampling,
        seed=seed,
        context=context,
        banned=banned,
    )
    return tokenizer.decode(tokens[0].tolist()).strip()
