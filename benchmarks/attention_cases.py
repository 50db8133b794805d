"""What bench_attention.py times on a GPU: shapes, features, and the same call for every peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

DEVICE = "cuda"
TOKENS, CHANNELS = 16384, 2048
# flex_attention takes seconds to compile for each shape
FLEX_SEQ = 4096
WINDOW = 1024
DROPOUT = 0.1

# takes query, key and value
Attend = Callable[..., Any]


class Case(NamedTuple):
    """A call [batch heads seq head_dim] with as many keys as queries, and what is switched on."""

    batch: int
    heads: int
    heads_kv: int
    seq: int
    head_dim: int
    head_dim_v: int
    causal: bool
    feature: str = "plain"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        dims = f"{self.head_dim}"
        if self.head_dim != self.head_dim_v:
            dims += f"/{self.head_dim_v}"
        words = [f"{self.batch}x{heads}x{self.seq}x{dims}", "causal" if self.causal else "full"]
        if self.feature != "plain":
            words.append(self.feature)
        if self.dtype != torch.bfloat16:
            words.append(str(self.dtype).removeprefix("torch."))
        return " ".join(words)


def _case(seq: int, head_dim: int, causal: bool, **others: Any) -> Case:
    heads = CHANNELS // head_dim
    shape = (TOKENS // seq, heads, heads, seq, head_dim, head_dim, causal)
    return Case(*shape)._replace(**others)


CASES = [
    *(
        _case(seq, head_dim, causal)
        for head_dim in (64, 128, 256)
        for causal in (True, False)
        for seq in (512, 1024, 2048, 4096, 8192, 16384)
    ),
    # Triton's tutorial 06, whose other shape, with 64, is among the above
    Case(4, 32, 32, 4096, 128, 128, True),
    _case(4096, 128, True, heads=32, heads_kv=8),
    _case(4096, 128, True, heads=32, heads_kv=1),
    _case(4096, 192, True, heads=16, heads_kv=16, head_dim_v=128),
    _case(4096, 128, True, dtype=torch.float16),
    _case(4096, 128, True, dtype=torch.float32),
    *(
        _case(4096, 128, True, feature=feature)
        for feature in ("window", "alibi", "softcap", "dropout", "sinks")
    ),
    *(_case(4096, 128, False, feature=feature) for feature in ("bias", "mask", "key_lengths")),
]
# mean length of the sequences that are packed into TOKENS rows
PACKED = (512, 4096)


@dataclass
class Feature:
    """One feature in everybody's words.

    Attributes:
        ours: keywords of ops.attention.
        attn_mask: of SDPA, whole; None where SDPA's own arguments say it all.
        score_mod: of flex_attention.
        mask_mod: of flex_attention; None sees everything.
        pairs: of query and key that are not hidden, of all heads and sequences; None: as causal.
        peers: False where the peers have no such thing.
    """

    ours: dict[str, Any] = field(default_factory=dict)
    attn_mask: Tensor | None = None
    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    pairs: float | None = None
    peers: bool = True


def _earlier(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _square(seq: int) -> Tensor:
    """How far the key is before the query: Int64[seq seq]."""
    index = torch.arange(seq, device=DEVICE)
    return index[:, None] - index


def make(case: Case) -> Feature:
    """The case's feature, with its tensors."""
    return _FEATURES[case.feature](case)


def _plain(case: Case) -> Feature:
    return Feature(mask_mod=_earlier if case.causal else None)


def _window(case: Case) -> Feature:
    distance = _square(case.seq)
    attn_mask = (distance >= 0) & (distance <= WINDOW)
    return Feature(
        {"window": (WINDOW, -1)},
        attn_mask,
        mask_mod=lambda b, h, q, k: (q >= k) & (q - k <= WINDOW),
        pairs=case.batch * case.heads * int(attn_mask.sum()),
    )


def _alibi(case: Case) -> Feature:
    slopes = 2.0 ** (-8 * torch.arange(1, case.heads + 1, device=DEVICE) / case.heads)
    distance = _square(case.seq)
    bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)
    return Feature(
        {"alibi_slopes": slopes},
        bias.to(case.dtype)[None],
        score_mod=lambda score, b, h, q, k: score - slopes[h] * (q - k),
        mask_mod=_earlier,
    )


def _softcap(case: Case) -> Feature:
    cap = 30.0
    return Feature(
        {"softcap": cap},
        score_mod=lambda score, b, h, q, k: cap * torch.tanh(score / cap),
        mask_mod=_earlier,
    )


def _dropout(case: Case) -> Feature:
    return Feature({"dropout_p": DROPOUT})


def _sinks(case: Case) -> Feature:
    return Feature({"sinks": torch.randn(case.heads, device=DEVICE)}, peers=False)


def _bias(case: Case) -> Feature:
    shape = (1, case.heads, case.seq, case.seq)
    bias = torch.randn(shape, device=DEVICE, dtype=case.dtype)
    return Feature(
        {"bias": bias}, bias, score_mod=lambda score, b, h, q, k: score + bias[0, h, q, k]
    )


def _mask(case: Case) -> Feature:
    """Documents of ragged lengths, as a boolean mask."""
    lengths = torch.tensor(ragged(case.seq, case.seq // 8), device=DEVICE)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=DEVICE), lengths)
    mask = document[:, None] == document
    return Feature(
        {"mask": mask},
        mask,
        mask_mod=lambda b, h, q, k: document[q] == document[k],
        pairs=case.batch * case.heads * int(mask.sum()),
    )


def _key_lengths(case: Case) -> Feature:
    steps = torch.arange(1, case.batch + 1, device=DEVICE)
    lengths = case.seq - 7 - case.seq * (steps - 1) // (2 * case.batch)
    return Feature(
        {"key_lengths": lengths},
        (torch.arange(case.seq, device=DEVICE) < lengths[:, None])[:, None, None],
        mask_mod=lambda b, h, q, k: k < lengths[b],
        pairs=case.heads * case.seq * int(lengths.sum()),
    )


_FEATURES: dict[str, Callable[[Case], Feature]] = {
    "plain": _plain,
    "window": _window,
    "alibi": _alibi,
    "softcap": _softcap,
    "dropout": _dropout,
    "sinks": _sinks,
    "bias": _bias,
    "mask": _mask,
    "key_lengths": _key_lengths,
}


def ragged(total: int, mean: int) -> list[int]:
    """Exponential lengths that add up to ``total``, the same every time."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = torch.empty(()).exponential_(1 / mean, generator=generator)
        lengths.append(min(1 + int(drawn), left))
    return lengths


def peers(case: Case, feature: Feature) -> dict[str, Attend]:
    """By name, functions of (query, key, value) that compute the same."""
    if not feature.peers:
        return {}
    found: dict[str, Attend] = {}
    if feature.score_mod is None or feature.attn_mask is not None:
        found = {
            "cudnn": _sdpa(case, feature, SDPBackend.CUDNN_ATTENTION),
            "flash": _sdpa(case, feature, SDPBackend.FLASH_ATTENTION),
            "efficient": _sdpa(case, feature, SDPBackend.EFFICIENT_ATTENTION),
        }
    if case.seq == FLEX_SEQ and "dropout_p" not in feature.ours:
        found["flex"] = flex(
            feature, case.batch if case.feature == "key_lengths" else None, case.seq
        )
    return found


def _sdpa(case: Case, feature: Feature, backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=feature.attn_mask,
                dropout_p=feature.ours.get("dropout_p", 0.0),
                is_causal=case.causal and feature.attn_mask is None,
                enable_gqa=case.heads != case.heads_kv,
            )

    return attend


def flex(feature: Feature, batch: int | None, seq: int) -> Attend:
    """flex_attention, compiled when it is first called; ``batch`` where the mask differs in it."""

    @cache
    def build() -> Attend:
        torch._dynamo.reset()  # or what was compiled for other shapes counts towards its limit
        compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        block_mask = None
        if feature.mask_mod is not None:
            block_mask = create_block_mask(feature.mask_mod, batch, None, seq, seq, device=DEVICE)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = compiled(
                query,
                key,
                value,
                score_mod=feature.score_mod,
                block_mask=block_mask,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            return out

        return attend

    return lambda query, key, value: build()(query, key, value)
