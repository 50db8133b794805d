"""One layer of a Transformer, and the stack of them, whatever the family."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmos_fast.models.attention import Angles, CrossAttention, SelfAttention
from llmos_fast.models.config import ModelConfig
from llmos_fast.models.feed_forward import FeedForward
from llmos_fast.models.rotary_angles import RotaryAngles
from llmos_fast.models.sequences import Continued, Packed, Sequences
from llmos_fast.nn import plain


@dataclass(frozen=True)
class Memory:
    """What an encoder made, as each layer of a decoder attends to it.

    layers: keys and values of each layer, [batch heads_kv seq_k head_dim]
    mask:   Bool[batch 1 1 seq_k], True = may be attended to
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor | None

    def rows(self, index: Tensor) -> Memory:
        """The memory whose row b is row index[b] of this one."""
        layers = [(key[index], value[index]) for key, value in self.layers]
        return Memory(layers, None if self.mask is None else self.mask[index])


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation of a model."""
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


class Block(nn.Module):
    """Self-attention, attention to a memory where there is one, and a feed-forward network.

    Every sublayer is followed or preceded by its norm, in one pass with the residual sum.
    """

    def __init__(self, config: ModelConfig, layer: int, *, cross: bool = False):
        super().__init__()
        self.norm_first = config.norm_first
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config, layer, config.window(layer))
        if cross:
            self.cross_norm = make_norm(config)
            self.cross_attention = CrossAttention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        sequences: Sequences,
        angles: Angles | None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(residual stream, what is to be added to it next) -> the same, after this layer.

        Float[batch seq width] each; ``update`` is None at first, and always with post-norm.
        """
        if not self.norm_first:
            x, _ = self._add_norm(self.attention_norm, self.attention(x, sequences, angles), x)
            x, _ = self._add_norm(self.ffn_norm, self.ffn(x), x)
            return x, None
        normed, x = self._add_norm(self.attention_norm, update, x)
        update = self.attention(normed, sequences, angles)
        if memory is not None:
            normed, x = self._add_norm(self.cross_norm, update, x)
            update = self.cross_attention(normed, *memory.layers[self.attention.layer], memory.mask)
        normed, x = self._add_norm(self.ffn_norm, update, x)
        return x, self.ffn(normed)

    def _add_norm(
        self, norm: nn.Module, update: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(norm(total), total) with total = residual + dropout(update)."""
        if update is None:
            return plain.norm(norm, residual), residual
        return plain.dropout_add_norm(self.dropout, norm, update, residual)


class Stack(nn.Module):
    """Blocks one after another, and the norm at their end (pre-norm only)."""

    def __init__(self, config: ModelConfig, layers: int, *, cross: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, i, cross=cross) for i in range(layers))
        self.norm = make_norm(config) if config.norm_first else None
        self.dropout = nn.Dropout(config.dropout)
        self._angles = (
            None if config.rotary is None else RotaryAngles(config.rotary, config.max_length)
        )

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        memory: Memory | None = None,
        update: Tensor | None = None,
    ) -> Tensor:
        """Float[batch seq width] -> Float[batch seq width], normalised.

        update: is added to ``x`` by the first norm
        """
        angles = self._angles_for(x, sequences)
        for block in self.blocks:
            x, update = block(x, update, sequences, angles, memory)
        if self.norm is None or update is None:
            return x
        return plain.dropout_add_norm(self.dropout, self.norm, update, x)[0]

    def _angles_for(self, x: Tensor, sequences: Sequences) -> Angles | None:
        if self._angles is None:
            return None
        length, room = x.shape[1], 0
        if isinstance(sequences, Packed):
            length = sequences.longest
        elif isinstance(sequences, Continued):
            # a captured step keeps the tables until the room is used up
            length, room = max(sequences.cache.sequence_lengths), sequences.cache.capacity
        return self._angles.tables(length, x.device, room)

    def keys_of(self, memory: Tensor, mask: Tensor | None) -> Memory:
        """``memory: Float[batch seq_k width]`` as the blocks attend to it."""
        attentions: list[CrossAttention] = [block.cross_attention for block in self.blocks]  # type: ignore[misc]
        return Memory([attention.project(memory) for attention in attentions], mask)


def initialize_(model: nn.Module, std: float = 0.02) -> None:
    """Weights normal with ``std``, biases 0, norms 1: GPT-2's start."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
