"""Bidirectional encoders: BERT with its pooler and heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmos_fast.models.block import Stack, initialize_, make_norm
from llmos_fast.models.config import ModelConfig
from llmos_fast.models.pretrained import Pretrained
from llmos_fast.models.sequences import Packed
from llmos_fast.nn import plain

HEADS = ("pooler", "mlm", "next", "sequence", "token")


class EncoderModel(Pretrained):
    """Embeddings and blocks; padding is left out of everything that is computed.

    heads: what stands on it: "pooler" (a layer on the first token), "mlm" (logits of masked
        tokens), "next" (whether the second sentence follows the first), "sequence" (a classifier of
        the pooled token), "token" (of every token)
    """

    def __init__(self, config: ModelConfig, heads: tuple[str, ...] = ("pooler",)):
        super().__init__()
        unknown = [head for head in heads if head not in HEADS]
        if unknown:
            raise ValueError(f"EncoderModel: heads must be among {HEADS}, got {unknown}")
        assert config.max_length is not None
        self.config, self.heads = config, heads
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.token_types = nn.Embedding(config.token_types, config.width)
        self.embedding_norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = Stack(config, config.layers)
        if "pooler" in heads:
            self.pooler = nn.Linear(config.width, config.width)
        if "mlm" in heads:
            self.transform = nn.Linear(config.width, config.width)
            self.transform_norm = make_norm(config)
            self.head = nn.Linear(config.width, config.vocabulary)
            self.head.weight = self.embedding.weight
        if "next" in heads:
            self.next_sentence = nn.Linear(config.width, 2)
        if "sequence" in heads or "token" in heads:
            self.classifier = nn.Linear(config.width, config.labels)
        if self.embedding.weight.device.type != "meta":
            initialize_(self)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """The last layer's output; zeros where a token is padding.

        tokens:      Int[batch seq]
        mask:        Bool or Int[batch seq], True (1) where a token is no padding
        token_types: Int[batch seq], kinds of segments; all 0 where not given
        returns:     Float[batch seq width]
        """
        if tokens.ndim != 2 or tokens.shape[1] > (self.config.max_length or 0):
            raise ValueError(
                f"EncoderModel: tokens must be [batch seq], seq at most {self.config.max_length}, "
                f"got shape {tuple(tokens.shape)}"
            )
        for name, given in (("mask", mask), ("token_types", token_types)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(
                    f"EncoderModel: {name} must have the shape of tokens {tuple(tokens.shape)}, "
                    f"got {tuple(given.shape)}"
                )
        kept = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        row, column = kept.nonzero(as_tuple=True)
        types = torch.zeros_like(column) if token_types is None else token_types[row, column]
        lengths = [length for length in kept.sum(1).tolist() if length]
        if not lengths:
            return next(self.stack.parameters()).new_zeros(*tokens.shape, self.config.width)
        packed = Packed.of(lengths, causal=False, device=tokens.device)
        x = self.embedding(tokens[row, column]) + self.positions(column)
        x = self.dropout(plain.norm(self.embedding_norm, x + self.token_types(types)))
        hidden: Tensor = self.stack(x[None], packed)
        if len(row) == tokens.numel():
            return hidden.view(*tokens.shape, -1)
        out = hidden.new_zeros(*tokens.shape, self.config.width)
        return out.index_put((row, column), hidden[0])

    def pool(self, hidden: Tensor) -> Tensor:
        """Tanh of a layer on the first token: Float[batch seq width] -> Float[batch width]."""
        return torch.tanh(plain.linear(self._part("pooler"), hidden[:, 0]))

    def mean_pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Mean over the tokens that are no padding, of length 1: a sentence's embedding.

        Source: Reimers, Gurevych 2019 (Sentence-BERT, arXiv 1908.10084).
        """
        kept = mask.to(hidden.dtype)
        mean = (hidden * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(mean, dim=-1)

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Of the token behind each position: Float[batch seq vocabulary]."""
        activation = self.stack.blocks[0].ffn.activation  # type: ignore[union-attr]
        x = activation(plain.linear(self._part("transform"), hidden))  # type: ignore[operator]
        return plain.linear(self.head, plain.norm(self.transform_norm, x))

    def next_sentence_logits(self, hidden: Tensor) -> Tensor:
        """[does follow, does not]: Float[batch seq width] -> Float[batch 2]."""
        return plain.linear(self._part("next_sentence"), self.pool(hidden))

    def classify(self, hidden: Tensor) -> Tensor:
        """Logits of labels: [batch labels] of sequences, [batch seq labels] of tokens."""
        read = self.pool(hidden) if "sequence" in self.heads else hidden
        return plain.linear(self._part("classifier"), self.dropout(read))

    def _part(self, name: str) -> nn.Module:
        if name not in self._modules:
            raise ValueError(f"EncoderModel: heads must include the {name}, got {self.heads}")
        return getattr(self, name)  # type: ignore[no-any-return]
