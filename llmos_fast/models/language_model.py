"""What training, evaluation and generation ask of a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BLOCK_LOGITS = 2**20  # 4 MiB


def loss_in_blocks(
    project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int
) -> Tensor:
    """Mean cross-entropy through a projection that is called, such as a quantized one.

    hidden:  Float[... width]; ``project`` makes logits of blocks of it, which stay in cache
    targets: Int[...], -100 skips
    returns: Float[]
    """
    rows = max(1, _BLOCK_LOGITS // vocabulary)
    flat, targets = hidden.flatten(0, -2), targets.flatten()
    losses = [
        F.cross_entropy(project(h).float(), t, reduction="sum")
        for h, t in zip(flat.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(losses).sum() / (targets != -100).sum()


class LanguageModel(nn.Module):
    """A model of the next token; subclasses define ``forward`` and ``loss``.

    ninp: width of the model, which some learning rate schedules use
    """

    ninp: int

    def forward(self, tokens: Tensor) -> Tensor:
        """Int[batch seq] -> logits of the next token at every position, Float[batch seq ntoken]."""
        raise NotImplementedError

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of ``targets: Int[batch seq]``, the token after each: Float[]."""
        raise NotImplementedError

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits of the token after the last one: Int[batch seq] -> Float[batch ntoken]."""
        logits: Tensor = self(tokens)[:, -1]
        return logits
