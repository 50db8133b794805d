"""llama2.c's files as Llama models of Hugging Face.

    version 0   seven int32 sizes; fp32 weights
    version 1   u32 "ak42", int32 1, seven int32 sizes, u8 whether embedding and projection are one,
                zeros up to byte 256; fp32 weights

Sizes: dim, hidden_dim, layers, heads, kv_heads, vocabulary (version 0: negative where the
projection is a matrix of its own), length. A part of the weights is that of all layers, one after
another.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmos_fast.checkpoints.reading import error_in, halves

Readers = dict[str, Callable[[], Tensor]]
Shapes = dict[str, tuple[int, ...]]

_MAGIC = 0x616B3432
_SIZES = ("dim", "hidden_dim", "layers", "heads", "kv_heads", "vocabulary", "length")
_ANGLES = "cos and sin of every position"  # computed afresh by every reader


def read_llama2c(path: Path) -> tuple[dict[str, Any], Readers]:
    """The config and the tensors of a file. Raises ValueError where its size is another one."""
    start, sizes, parts, tied = _header(path)
    copies = {name: sizes["layers"] if "{}" in name else 1 for name in parts}
    expected = start + sum(4 * copies[name] * prod(shape) for name, shape in parts.items())
    size = path.stat().st_size
    if size != expected:
        raise error_in(path, f"be {expected} bytes long, as its header says", size)

    numbers = torch.from_numpy(np.asarray(np.memmap(path, "<f4", "c", start)))
    heads = {"q_proj": sizes["heads"], "k_proj": sizes["kv_heads"]}
    readers: Readers = {}
    offset = 0
    for part, shape in parts.items():
        pairs = next((count for name, count in heads.items() if name in part), 0)
        for i in range(copies[part]):
            end = offset + prod(shape)
            if part != _ANGLES:
                readers[part.format(i)] = partial(_read, numbers[offset:end], shape, pairs)
            offset = end
    return _config(sizes, tied), readers


def _header(path: Path) -> tuple[int, dict[str, int], Shapes, bool]:
    """Where the weights begin, sizes, parts, and whether the projection is the embedding."""
    with path.open("rb") as file:
        head = file.read(256)
    versioned = int.from_bytes(head[:4], "little") == _MAGIC
    start = 256 if versioned else 28
    if len(head) < start:
        raise error_in(path, f"begin with a header of {start} bytes", f"{len(head)} bytes")
    numbers = struct.unpack_from("<2i7i" if versioned else "<7i", head)
    if versioned and numbers[1] != 1:
        raise error_in(path, "have version 0 or 1", numbers[1])
    sizes = dict(zip(_SIZES, numbers[-7:], strict=True))
    tied = bool(head[36]) if versioned else sizes["vocabulary"] > 0
    if not versioned:
        sizes["vocabulary"] = abs(sizes["vocabulary"])
    for name, value in sizes.items():
        if value < 1:
            raise error_in(path, f"have a positive {name}", value)
    dim, heads, kv_heads = sizes["dim"], sizes["heads"], sizes["kv_heads"]
    if dim % (2 * heads) or heads % kv_heads:
        rule = "split dim into heads of even width, and heads into kv_heads"
        raise error_in(path, rule, f"{dim}, {heads} and {kv_heads}")
    return start, sizes, _parts(sizes, versioned, tied), tied


def _parts(sizes: dict[str, int], versioned: bool, tied: bool) -> Shapes:
    """Shapes by name, in the file's order; "{}" stands for a layer."""
    dim, hidden, vocabulary = sizes["dim"], sizes["hidden_dim"], sizes["vocabulary"]
    head_dim = dim // sizes["heads"]
    kv = sizes["kv_heads"] * head_dim
    layer = "model.layers.{}."
    embedding: Shapes = {"model.embed_tokens.weight": (vocabulary, dim)}
    attention_norm: Shapes = {f"{layer}input_layernorm.weight": (dim,)}
    ffn_norm: Shapes = {f"{layer}post_attention_layernorm.weight": (dim,)}
    norm: Shapes = {"model.norm.weight": (dim,)}
    attention: Shapes = {
        f"{layer}self_attn.q_proj.weight": (dim, dim),
        f"{layer}self_attn.k_proj.weight": (kv, dim),
        f"{layer}self_attn.v_proj.weight": (kv, dim),
        f"{layer}self_attn.o_proj.weight": (dim, dim),
    }
    ffn: Shapes = {
        f"{layer}mlp.gate_proj.weight": (hidden, dim),
        f"{layer}mlp.down_proj.weight": (dim, hidden),
        f"{layer}mlp.up_proj.weight": (hidden, dim),
    }
    projection: Shapes = {} if tied else {"lm_head.weight": (vocabulary, dim)}
    if versioned:
        return attention_norm | ffn_norm | norm | embedding | attention | ffn | projection
    angles = {_ANGLES: (sizes["length"], head_dim)}
    first = embedding | attention_norm | attention | ffn_norm | ffn
    return first | norm | angles | projection


def _read(numbers: Tensor, shape: tuple[int, ...], heads: int) -> Tensor:
    """A tensor; with ``heads``, of rows that are turned in pairs."""
    rows = numbers.view(shape)
    return halves(rows, heads) if heads else rows


def _config(sizes: dict[str, int], tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": sizes["vocabulary"],
        "hidden_size": sizes["dim"],
        "intermediate_size": sizes["hidden_dim"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": sizes["dim"] // sizes["heads"],
        "max_position_embeddings": sizes["length"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
