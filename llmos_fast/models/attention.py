"""Attention of a block: projections around heads that are normalised and turned."""

from __future__ import annotations

from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.models.config import ModelConfig
from llmos_fast.models.sequences import Sequences
from llmos_fast.nn import plain

Angles = tuple[Tensor, Tensor]


def to_heads(x: Tensor, head_dim: int) -> Tensor:
    """[batch seq heads*head_dim] -> [batch heads seq head_dim], a view."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim))
    return heads.transpose(1, 2)


def from_heads(x: Tensor) -> Tensor:
    """The inverse; a view where heads lie inside rows."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """out(attention of the heads of qkv(x)).

    qkv: one projection to the heads of queries, of keys and of values
    """

    def __init__(self, config: ModelConfig, layer: int, window: tuple[int, int] | None):
        super().__init__()
        self.layer = layer
        self.head_dim, self.scale, self.window = config.head_dim, config.scale, window
        self.heads = (config.heads, config.kv_heads, config.kv_heads)
        self.qkv = nn.Linear(config.width, sum(self.heads) * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * self.head_dim, config.width, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, sequences: Sequences, angles: Angles | None) -> Tensor:
        """Float[batch seq width] -> Float[batch seq width]."""
        heads = to_heads(plain.linear(self.qkv, x), self.head_dim)
        q, k, v = heads.split(self.heads, dim=1)
        if "q_norm" in self._modules:
            q, k = plain.norm(self.q_norm, q), plain.norm(self.k_norm, k)
        if angles is not None:
            cos, sin = angles
            if sequences.positions is None:
                cos, sin = cos[: x.shape[1]], sin[: x.shape[1]]
            q, k = ops.rotary(q, k, cos, sin, positions=sequences.positions)
        attended = sequences.self_attention(
            self.layer, q, k, v, scale=self.scale, window=self.window
        )
        return plain.linear(self.out, from_heads(attended))


class CrossAttention(nn.Module):
    """Attention of a decoder's tokens to what an encoder made.

    kv: one projection of the encoder's output to the heads of keys and of values
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.scale = config.head_dim, config.scale
        self.q = nn.Linear(config.width, config.heads * self.head_dim, bias=config.qkv_bias)
        self.kv = nn.Linear(config.width, 2 * config.kv_heads * self.head_dim, config.qkv_bias)
        self.out = nn.Linear(config.heads * self.head_dim, config.width, bias=config.out_bias)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch heads_kv seq_k head_dim] of ``memory: Float[batch seq_k width]``.

        They serve every token that is decoded.
        """
        key, value = to_heads(plain.linear(self.kv, memory), self.head_dim).chunk(2, dim=1)
        return key, value

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Float[batch seq width] -> Float[batch seq width].

        key, value: from ``project``
        mask:       Bool, broadcastable to [batch heads seq seq_k], True = may be attended to
        """
        q = to_heads(plain.linear(self.q, x), self.head_dim)
        attended: Tensor = ops.attention(q, key, value, mask=mask, scale=self.scale)  # type: ignore[assignment]
        return plain.linear(self.out, from_heads(attended))
