"""What distinguishes one Transformer from another, in the terms of the shared blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# beyond them a product of two would not fit its type: they come from damaged files
LARGEST_SIZE = 2**28
LARGEST_NUMBER = 2.0**60
_MOST_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions (Su et al. 2021).

    base:    of the geometric series of wavelengths
    dim:     leading features of a head that turn
    scaling: how longer contexts are reached, as "rope_parameters" of a Hugging Face config
    """

    base: float
    dim: int
    scaling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options of a model.

    vocabulary:  tokens
    width:       features of a token
    layers:      of the decoder in an encoder-decoder
    heads:       of queries
    kv_heads:    of keys and values, a divisor of ``heads``
    head_dim:    features of a head
    inner:       width of the feed-forward network
    max_length:  positions; None where nothing limits them
    norm:        "layer" or "rms"
    norm_first:  normalise what enters a sublayer (GPT-2), or what leaves it (BERT)
    activation:  as ops.ffn names it; ``gated``: multiplied by a second projection (SwiGLU)
    qkv_bias, out_bias, inner_bias, head_bias: of the projections
    qk_norm:     normalise every head of query and key (Qwen3)
    learned_positions: vectors that are trained; added to embeddings
    rotary:      angles by which heads turn
    relative_buckets: of relative positions with a bias per head (T5)
    scale:       of scores; None is head_dim ** -0.5
    windows:     for each layer, how many keys back a query sees, itself included; None sees all
    tied:        the output projection is the embedding
    head_scale:  multiplies what the output projection reads
    encoder_layers: of an encoder-decoder
    token_types: kinds of segments (BERT)
    labels:      of a classifier
    dropout, attention_dropout: in training
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    max_length: int | None
    norm: str
    norm_eps: float
    norm_first: bool = True
    activation: str
    gated: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    inner_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    learned_positions: bool = False
    rotary: Rotary | None = None
    relative_buckets: int = 0
    relative_max_distance: int = 128
    scale: float | None = None
    windows: tuple[int | None, ...] = ()
    tied: bool = False
    head_scale: float = 1.0
    encoder_layers: int = 0
    token_types: int = 0
    labels: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError that names the field, its rule and its value."""
        positive = ("vocabulary", "width", "layers", "heads", "kv_heads", "head_dim", "inner")
        for name in (*positive, "encoder_layers", "token_types", "labels"):
            value, least = getattr(self, name), int(name in positive)
            most = _MOST_LAYERS if name.endswith("layers") else LARGEST_SIZE
            if not isinstance(value, int) or not least <= value <= most:
                raise _error(name, f"be an integer in {least}..{most}", value)
        if self.heads * self.head_dim > LARGEST_SIZE:
            rule = f"be at most {LARGEST_SIZE} features with heads = {self.heads}"
            raise _error("head_dim", rule, self.head_dim)
        if self.max_length is not None and not 0 < self.max_length <= LARGEST_SIZE:
            raise _error("max_length", f"be in 1..{LARGEST_SIZE}", self.max_length)
        if self.heads % self.kv_heads:
            raise _error("kv_heads", f"divide heads = {self.heads}", self.kv_heads)
        if not 0 < self.norm_eps < 1:
            raise _error("norm_eps", "be in 0..1", self.norm_eps)
        buckets = self.relative_buckets
        if buckets and not 4 <= buckets < self.relative_max_distance:
            rule = f"be in 4..{self.relative_max_distance - 1} (relative_max_distance - 1)"
            raise _error("relative_buckets", rule, buckets)
        if self.rotary is not None and not 0 < self.rotary.dim <= self.head_dim:
            raise _error("rotary.dim", f"be in 1..{self.head_dim}", self.rotary.dim)
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise _error(name, "be in 0..1 (1 excluded)", getattr(self, name))

    @property
    def projection_rows(self) -> tuple[int, int, int]:
        """Rows of the projections to queries, keys and values."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    def window(self, layer: int) -> tuple[int, int] | None:
        """(left, right) of ``layer`` as ops.attention takes it."""
        size = self.windows[layer] if self.windows else None
        return None if size is None else (size - 1, 0)


def _error(argument: str, rule: str, value: object) -> ValueError:
    return ValueError(f"ModelConfig: {argument} must {rule}, got {value!r}")
