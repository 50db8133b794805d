"""Decoder-only language models: GPT-2, Llama and what is configured like them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.models.block import Stack, initialize_
from llmos_fast.models.config import ModelConfig
from llmos_fast.models.language_model import LanguageModel, loss_in_blocks
from llmos_fast.models.paged_cache import PagedCache
from llmos_fast.models.pretrained import Pretrained
from llmos_fast.models.sequences import Batch, Continued, Packed
from llmos_fast.nn import plain


class CausalLM(Pretrained, LanguageModel):
    """Embedding, blocks, norm and a projection to the vocabulary.

    Call it for training and evaluation; generation reads prompts with ``read`` and goes on with
    ``step``, which keep what they compute in a ``PagedCache``.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.ninp = config, config.width
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        if config.learned_positions:
            assert config.max_length is not None
            self.positions = nn.Embedding(config.max_length, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = Stack(config, config.layers)
        self.head = nn.Linear(config.width, config.vocabulary, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.embedding.weight
        if self.head.weight.device.type != "meta":
            initialize_(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return next(self.stack.parameters()).dtype

    def hidden(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Int[batch seq] -> Float[batch seq width], normalised.

        lengths: Int[batch], tokens of each row; what follows them is padding. A token never sees
            what comes after it, so this only saves time.
        """
        _check_tokens(tokens, self.config)
        dropout_p = self.config.attention_dropout if self.training else 0.0
        added = None
        if self.config.learned_positions:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            added = plain.embedding(self.positions, positions)
        x = plain.embedding(self.embedding, tokens, positions=added, dropout=self.dropout)
        sequences = Batch(causal=True, key_lengths=lengths, dropout_p=dropout_p)
        return self.stack(x, sequences)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position: Float[batch seq vocabulary]."""
        return self._project(self.hidden(tokens, lengths))

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits of the token after the last one, the only row that is projected."""
        return self._project(self.hidden(tokens)[:, -1])

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of ``targets: Int[batch seq]``, the token after each; -100 skips."""
        if targets.shape != tokens.shape:
            raise ValueError(
                f"CausalLM.loss: targets must have the shape of tokens {tuple(tokens.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        hidden = self.hidden(tokens)
        if plain.is_plain(self.head, nn.Linear):
            return ops.linear_cross_entropy(hidden, self.head.weight, targets, self.head.bias)
        return loss_in_blocks(self.head, hidden, targets, self.config.vocabulary)

    def new_cache(self, dtype: torch.dtype | None = None, tokens: int = 256) -> PagedCache:
        """An empty cache; ``dtype`` is the model's or int8, ``tokens`` how many to expect."""
        c = self.config
        device = next(self.stack.parameters()).device
        dtype = dtype or self.dtype
        return PagedCache(
            c.layers, c.kv_heads, c.head_dim, dtype=dtype, device=device, tokens=tokens
        )

    @torch.no_grad()
    def read(self, prompts: list[list[int]], cache: PagedCache) -> Tensor:
        """Begin sequences in an empty cache; no token is padding, whatever their lengths.

        prompts: of one token at least each
        returns: logits of the token after each: Float[batch vocabulary]
        """
        lengths = [len(prompt) for prompt in prompts]
        cache.add_sequences(len(prompts))
        cache.extend(lengths)
        device = cache.device
        tokens = torch.tensor([t for prompt in prompts for t in prompt], device=device)
        packed = Packed.of(lengths, True, device, cache)
        x = self.stack(self._embed(tokens[None], packed.positions), packed)
        last = torch.tensor(packed.offsets[1:], device=device) - 1
        return self._project(x[0, last])

    def step(self, tokens: Tensor, positions: Tensor, cache: PagedCache) -> Tensor:
        """Logits after each of the newest tokens: Float[batch seq vocabulary].

        tokens:    Int[batch seq]; the cache counts them already
        positions: Int64[batch seq], of ``cache.positions``

        Native ops only where the kernels take the weights, so that ``capture`` can record it.
        """
        x = plain.embedding(self.embedding, tokens)
        # a sum of its own would be torch's: the first norm adds
        update = (
            plain.embedding(self.positions, positions) if self.config.learned_positions else None
        )
        return self._project(self.stack(x, Continued(cache, positions), update=update))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = plain.embedding(self.embedding, tokens)
        if not self.config.learned_positions:
            return x
        return x + plain.embedding(self.positions, positions)

    def _project(self, hidden: Tensor) -> Tensor:
        return plain.linear(self.head, hidden)


def _check_tokens(tokens: Tensor, config: ModelConfig) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"CausalLM: tokens must be [batch seq], got shape {tuple(tokens.shape)}")
    if config.learned_positions and tokens.shape[1] > (config.max_length or 0):
        raise ValueError(
            f"CausalLM: tokens must be at most {config.max_length} in a row, got {tokens.shape[1]}"
        )
