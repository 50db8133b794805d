"""Sinusoidal positions of "Attention Is All You Need" (Vaswani et al., 2017), section 3.5."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(length: int, width: int) -> Tensor:
    """Position ``p`` in channels ``2i`` and ``2i + 1``: sin and cos of ``p / 10000^(2i / width)``.

    returns: Float[length width]; an odd width ends with a sine.
    """
    position = torch.arange(length).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = position * frequency
    table = torch.empty(length, width)
    table[:, 0::2] = torch.sin(angle)
    table[:, 1::2] = torch.cos(angle[:, : width // 2])
    return table


class PositionalEncoding(nn.Module):
    """Adds sinusoidal positions, then applies dropout. It has no parameters and no state."""

    table: Tensor

    def __init__(self, width: int, dropout: float, max_length: int = 5000):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("table", sinusoids(max_length, width), persistent=False)

    def rows(self, length: int) -> Tensor:
        """Float[length width], what is added. Raises ValueError beyond ``max_length``."""
        if length > self.table.shape[0]:
            raise ValueError(
                f"PositionalEncoding: seq must be at most {self.table.shape[0]}, got {length}"
            )
        return self.table[:length]

    def forward(self, x: Tensor) -> Tensor:
        """x: Float[batch seq width]. Raises ValueError where seq exceeds ``max_length``."""
        return self.dropout(x + self.rows(x.shape[1]).to(x.dtype))  # type: ignore[no-any-return]
