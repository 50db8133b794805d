"""Encoder-decoder models with relative position biases: T5."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.models.block import Memory, Stack, initialize_
from llmos_fast.models.config import ModelConfig
from llmos_fast.models.language_model import loss_in_blocks
from llmos_fast.models.pretrained import Pretrained
from llmos_fast.models.sequences import Batch, Decoded
from llmos_fast.nn import Cache, plain


class RelativeBias(nn.Module):
    """A number per head for each bucket of distances between two tokens (Raffel et al. 2020)."""

    def __init__(self, config: ModelConfig, bidirectional: bool):
        super().__init__()
        self.buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        self.bidirectional = bidirectional
        # no nn.Embedding, which would be quantized: it is small, and added to every score
        self.table = nn.Parameter(torch.empty(config.relative_buckets, config.heads))
        nn.init.normal_(self.table, std=0.05)

    def forward(self, start: int, seq_q: int, seq_k: int) -> Tensor:
        """Bias of queries at start, start + 1, ... to keys from 0: Float[1 heads seq_q seq_k]."""
        device = self.table.device
        key = torch.arange(seq_k, device=device)
        distance = key - torch.arange(start, start + seq_q, device=device)[:, None]
        return nn.functional.embedding(self._bucket(distance), self.table).permute(2, 0, 1)[None]

    def _bucket(self, distance: Tensor) -> Tensor:
        """Exact for small distances, logarithmic up to ``max_distance``, one for all beyond."""
        buckets, first = self.buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        far = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        coarse = (exact + (far * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, coarse)


class EncoderDecoder(Pretrained):
    """Two stacks on one embedding; the decoder attends to what the encoder made.

    ``forward`` and ``loss`` for training; ``encode`` and ``step`` to generate.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Stack(config, config.encoder_layers)
        self.decoder = Stack(config, config.layers, cross=True)
        self.encoder_bias = RelativeBias(config, bidirectional=True)
        self.decoder_bias = RelativeBias(config, bidirectional=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.embedding.weight
        if self.embedding.weight.device.type != "meta":
            initialize_(self, 0.05)

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Memory:
        """What the decoder attends to, of ``tokens: Int[batch seq]``.

        mask: Bool or Int[batch seq], True (1) where a token is no padding
        """
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"EncoderDecoder: mask must have the shape of tokens {tuple(tokens.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        seen = None if mask is None else mask.bool()[:, None, None, :]
        bias = self.encoder_bias(0, tokens.shape[1], tokens.shape[1])
        x = self.dropout(self.embedding(tokens))
        sequences = Batch(False, mask=seen, bias=bias, dropout_p=self._attention_dropout)
        hidden = self.dropout(self.encoder(x, sequences))
        return self.decoder.keys_of(hidden, seen)

    def forward(self, tokens: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits after every token of ``target``, which begins with the start token.

        tokens: Int[batch seq]; mask: as in ``encode``; target: Int[batch seq_t]
        returns: Float[batch seq_t vocabulary]
        """
        return self._project(self._decode(target, self.encode(tokens, mask)))

    def loss(
        self, tokens: Tensor, target: Tensor, labels: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy of ``labels: Int[batch seq_t]``, the token after each of target."""
        hidden = self._decode(target, self.encode(tokens, mask))
        if plain.is_plain(self.head, nn.Linear):
            return ops.linear_cross_entropy(self._scaled(hidden), self.head.weight, labels)
        return loss_in_blocks(self._project, hidden, labels, self.config.vocabulary)

    def step(self, tokens: Tensor, memory: Memory, cache: Cache) -> Tensor:
        """Logits after each of the next ``tokens: Int[batch seq]``: Float[batch seq vocabulary].

        cache: ``new_cache(batch)`` at first
        """
        start, seq = cache.length, tokens.shape[1]
        bias = self.decoder_bias(start, seq, start + seq)
        hidden = self.decoder(self.embedding(tokens), Decoded(cache.layers, bias), memory)
        return self._project(hidden)

    def new_cache(self, batch: int) -> Cache:
        """What the decoder keeps of a batch of sequences."""
        return Cache(self.config.layers, batch)

    @property
    def start_id(self) -> int:
        """The token that begins every target."""
        return int(self.hf_config.get("decoder_start_token_id") or 0)

    @property
    def embedding_device(self) -> torch.device:
        """Where the model is."""
        return next(self.decoder.parameters()).device

    @property
    def _attention_dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def _decode(self, target: Tensor, memory: Memory) -> Tensor:
        bias = self.decoder_bias(0, target.shape[1], target.shape[1])
        x = self.dropout(self.embedding(target))
        sequences = Batch(True, bias=bias, dropout_p=self._attention_dropout)
        return self.dropout(self.decoder(x, sequences, memory))  # type: ignore[no-any-return]

    def _project(self, hidden: Tensor) -> Tensor:
        return plain.linear(self.head, self._scaled(hidden))

    def _scaled(self, hidden: Tensor) -> Tensor:
        scale = self.config.head_scale
        return hidden if scale == 1.0 else hidden * scale
