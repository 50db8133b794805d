"""How the tokens of one forward pass lie in memory, and which of them see one another.

Attention of a block projects and rotates; what a query may attend to is decided here:

    Batch       rows of one length, padded where they are shorter: training, encoders
    Packed      sequences of any lengths one after another: prompts, without padding
    Continued   the newest tokens of every sequence, after what a cache holds
    Decoded     likewise, in caches that hold whole tensors and take a bias (T5)

Each has ``positions`` for the rotary angles and ``self_attention`` for a layer's heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llmos_fast import ops
from llmos_fast.models.paged_cache import PagedCache
from llmos_fast.nn import LayerCache


@dataclass(frozen=True)
class Batch:
    """[batch seq] tokens.

    causal:      a token sees itself and what precedes it
    key_lengths: Int[batch], where padding begins
    mask:        Bool, broadcastable to [batch heads seq seq], True = may be attended to
    bias:        Float likewise, added to the scores
    dropout_p:   of attention probabilities
    """

    causal: bool
    key_lengths: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0
    positions: None = None

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Float[batch heads seq head_dim] of each -> the same of the queries."""
        out: Tensor = ops.attention(  # type: ignore[assignment]
            q,
            k,
            v,
            mask=self.mask,
            bias=self.bias,
            causal=self.causal,
            key_lengths=self.key_lengths,
            dropout_p=self.dropout_p,
            **options,
        )
        return out


@dataclass(frozen=True)
class Packed:
    """[1 total] tokens of several sequences, each seeing its own only.

    offsets:   where each sequence begins, and the end: starts with 0
    causal:    a token sees itself and what precedes it
    positions: Int64[1 total] in each sequence
    starts:    Int32[sequences + 1], the offsets where the model is
    cache:     where keys and values are kept; room for them is there already
    """

    offsets: list[int]
    causal: bool
    positions: Tensor
    starts: Tensor
    cache: PagedCache | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(b - a for a, b in pairwise(self.offsets))

    @classmethod
    def of(
        cls, lengths: list[int], causal: bool, device: torch.device, cache: PagedCache | None = None
    ) -> Packed:
        """Sequences of ``lengths`` tokens, from position 0."""
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        positions = torch.cat([torch.arange(length) for length in lengths])
        starts = torch.tensor(offsets, dtype=torch.int32, device=device)
        return cls(offsets, causal, positions[None].to(device), starts, cache)

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Float[1 heads total head_dim] of each -> the same of the queries."""
        if self.cache is not None:
            for row, (start, end) in enumerate(pairwise(self.offsets)):
                self.cache.write(layer, k[:, :, start:end], v[:, :, start:end], row)
        if len(self.offsets) == 2:
            out: Tensor = ops.attention(q, k, v, causal=self.causal, **options)  # type: ignore[assignment]
            return out
        rows = [t[0].transpose(0, 1) for t in (q, k, v)]
        cu_seqlens = (self.starts, self.starts, self.longest, self.longest)
        packed: Tensor = ops.attention(  # type: ignore[assignment]
            *rows, cu_seqlens=cu_seqlens, causal=self.causal, **options
        )
        return packed.transpose(0, 1)[None]


@dataclass(frozen=True)
class Continued:
    """[batch seq] tokens, the newest of their sequences; the cache has room and counts them.

    positions: Int64[batch seq]
    """

    cache: PagedCache
    positions: Tensor

    def self_attention(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        window: tuple[int, int] | None,
    ) -> Tensor:
        """Float[batch heads seq head_dim] of each -> the same of the queries."""
        self.cache.write(layer, k, v)
        return ops.attention_decode(q, **self.cache.of(layer), scale=scale, window=window)


@dataclass(frozen=True)
class Decoded:
    """[batch seq] tokens after those in ``caches``, one LayerCache per layer.

    bias: Float, broadcastable to [batch heads seq length + seq]
    """

    caches: list[LayerCache]
    bias: Tensor | None
    positions: None = None

    def self_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Float[batch heads seq head_dim] of each -> the same of the queries."""
        k, v = self.caches[layer].append(k, v)
        out: Tensor = ops.attention(q, k, v, bias=self.bias, causal="bottom_right", **options)  # type: ignore[assignment]
        return out


Sequences = Batch | Packed | Continued | Decoded
