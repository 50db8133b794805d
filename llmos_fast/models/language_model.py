"""What training, evaluation and generation ask of a model."""

from __future__ import annotations

from torch import Tensor, nn


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
