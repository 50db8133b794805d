"""karpathy's stories260K (MIT) in transformers, read from the files of llama2.c.

stories260K.bin   seven int32 sizes, then fp32 weights
tok512.bin        int32 longest token, then of each token: fp32 score, int32 bytes, its bytes
"""

from __future__ import annotations

import re
import struct
import sys
from functools import cache
from itertools import chain, pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# transformers looks for a package of this name, and would find this project's folder
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

BOS = 1
# valid_sample.txt separates stories as it does paragraphs
_STORY_START = re.compile(r"\n\n(?=Once|One day|There once|There was|In a)")


def load_model(path: Path) -> LlamaForCausalLM:
    """The model in a llama2.c file whose embedding and projection are one."""
    raw = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("7i", raw)
    numbers = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    taken = 0

    def take(*shape: int) -> Tensor:
        nonlocal taken
        taken += prod(shape)
        return numbers[taken - prod(shape) : taken].view(shape)

    head_dim = dim // heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    parts = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": _halves(take(layers, dim, dim), heads),
        "self_attn.k_proj": _halves(take(layers, kv_heads * head_dim, dim), kv_heads),
        "self_attn.v_proj": take(layers, kv_heads * head_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for name, stacked in parts.items():
        for i in range(layers):
            state[f"model.layers.{i}.{name}.weight"] = stacked[i]
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(stacked: Tensor, heads: int) -> Tensor:
    """Rows of each head from llama2.c's pairs (0, 1), (2, 3) to transformers' (0, D/2), ..."""
    return stacked.unflatten(1, (heads, -1, 2)).transpose(2, 3).flatten(1, 3)


class Tokenizer:
    """llama2.c's byte pair encoding: always the merge with the best score."""

    def __init__(self, path: Path):
        raw = path.read_bytes()
        self.scores: dict[bytes, tuple[float, int]] = {}
        offset = 4
        while offset < len(raw):
            score, length = struct.unpack_from("<fi", raw, offset)
            offset += 8 + length
            self.scores[raw[offset - length : offset]] = (score, len(self.scores))

    def encode(self, story: str) -> list[int]:
        """Tokens of a story, after a BOS. No token goes on beyond a space."""
        words = re.findall(r"(?: |^)[^ ]*", " " + story.strip())
        return [BOS, *chain.from_iterable(self._word(word) for word in words)]

    @cache  # noqa: B019
    def _word(self, word: str) -> list[int]:
        pieces = [letter.encode() for letter in word]
        while True:
            pairs = [a + b for a, b in pairwise(pieces)]
            known = [
                (self.scores[pair][0], -i) for i, pair in enumerate(pairs) if pair in self.scores
            ]
            if not known:
                break
            best = -max(known)[1]
            pieces[best : best + 2] = [pairs[best]]
        # a byte without a token of its own is token 3 + its value
        return [
            token
            for piece in pieces
            for token in (
                [self.scores[piece][1]] if piece in self.scores else [b + 3 for b in piece]
            )
        ]


def windows(tokenizer: Tokenizer, stories: list[str], count: int, length: int) -> Tensor:
    """Int[count length]: the stories one after another, as llama2.c trains and evaluates."""
    tokens: list[int] = []
    for story in stories:
        if len(tokens) >= count * length:
            break
        tokens += tokenizer.encode(story)
    return torch.tensor(tokens[: len(tokens) // length * length][: count * length]).view(-1, length)


def training_stories(folder: Path) -> list[str]:
    return (folder / "train_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")


def validation_stories(folder: Path) -> list[str]:
    """The first piece is the end of a story, and left out."""
    return _STORY_START.split((folder / "valid_sample.txt").read_text(encoding="utf-8"))[1:]
