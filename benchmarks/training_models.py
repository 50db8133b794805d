"""GPT-2's architecture on torch.nn's layers and on ours, and a training step of either.

Both have the same parameters under the same names. What follows the layers is each library's own
way: a projection and F.cross_entropy, or ops.linear_cross_entropy, which never holds all logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmos_fast.nn
from llmos_fast import ops

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    d_model: int
    nhead: int
    layers: int
    seq: int
    batch: int
    vocabulary: int

    @property
    def step_flops(self) -> int:
        """Products of a step: 6 per weight and token, and causal attention's."""
        weights = self.layers * 12 * self.d_model**2 + self.vocabulary * self.d_model
        attention = self.layers * 6 * self.batch * self.seq**2 * self.d_model
        return 6 * self.batch * self.seq * weights + attention

    def shrunk(self) -> Shape:
        """Small enough to compare losses in a moment."""
        return Shape(64, 4, 2, min(self.seq, 32), 2, 500)


GPT2_SMALL = Shape(768, 12, 12, 256, 4, 50257)


class TorchGPT(nn.Module):
    """Pre-norm, GELU, learned positions, a projection tied to the embedding."""

    library = nn

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        width = shape.d_model
        layer = self.library.TransformerEncoderLayer(
            width, shape.nhead, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.tokens = nn.Embedding(shape.vocabulary, width)
        self.positions = nn.Embedding(shape.seq, width)
        self.stack = self.library.TransformerEncoder(
            layer, shape.layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.projection = nn.Linear(width, shape.vocabulary, bias=False)
        self.projection.weight = self.tokens.weight
        self.dropout = dropout
        mask = nn.Transformer.generate_square_subsequent_mask(shape.seq)
        self.register_buffer("mask", mask)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.stack(self.embedded(tokens), mask=self.mask, is_causal=True)

    def embedded(self, tokens: Tensor) -> Tensor:
        return F.dropout(self.tokens(tokens) + self.positions.weight, self.dropout)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.projection(self.hidden(tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class OurGPT(TorchGPT):
    library = llmos_fast.nn

    def embedded(self, tokens: Tensor) -> Tensor:
        table, positions = self.tokens.weight, self.positions.weight
        return ops.embedding(tokens, table, positions=positions, dropout_p=self.dropout)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return ops.linear_cross_entropy(self.hidden(tokens), self.projection.weight, targets)


def training_step(
    kind: type[TorchGPT],
    shape: Shape,
    dropout: float = 0.0,
    autocast: bool = False,
    wrap: Callable[[LossFunction], LossFunction] = lambda loss: loss,
) -> Callable[[], float]:
    """A function that makes one step (forward, backward, fused AdamW) and returns its loss.

    The same seed gives both kinds the same weights and tokens. ``wrap`` may compile the loss.
    """
    torch.manual_seed(0)
    model = kind(shape, dropout)
    loss_of = wrap(model.loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text = torch.randint(shape.vocabulary, (shape.batch, shape.seq + 1))
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(tokens, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def named_step(library: str, sizes: list[int]) -> Callable[[], float]:
    """For a process of its own."""
    kinds = {"llmos_fast": OurGPT, "torch.nn": TorchGPT}
    return training_step(kinds[library], Shape(*sizes), 0.1)


def check_same_losses(shape: Shape, steps: int = 5) -> None:
    """Without dropout both kinds follow one loss curve: a few steps, small, in fp32."""
    ours, theirs = (training_step(kind, shape.shrunk()) for kind in (OurGPT, TorchGPT))
    for _ in range(steps):  # in the precision they were computed in, which decides the tolerance
        torch.testing.assert_close(torch.tensor(ours()), torch.tensor(theirs()))
