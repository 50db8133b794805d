"""GGUF files of llama.cpp as models of Hugging Face: names, layouts and configs.

llama.cpp turns pairs (0, 1), (2, 3) of a head where Hugging Face turns (0, D/2), ...: the rows of
Llama's queries and keys are put back. GPT-2's matrices become [in, out] again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmos_fast.checkpoints.gguf_file import GGUF, open_gguf
from llmos_fast.checkpoints.gguf_tokenizer import KINDS, build_tokenizer
from llmos_fast.checkpoints.reading import halves

Readers = dict[str, Callable[[], Tensor]]
Names = dict[str, str]

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,4})\.")


def _layers(before: str, after: str, parts: Names) -> Names:
    return {f"{before}{ours}": f"{after}{theirs}" for ours, theirs in parts.items()}


# names without ".weight" and ".bias"; "{}" stands for the layer
_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
} | _layers(
    "blk.{}.",
    "model.layers.{}.",
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
} | _layers(
    "blk.{}.",
    "transformer.h.{}.",
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
)
_TRANSPOSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
_BERT = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
} | _layers(
    "blk.{}.",
    "encoder.layer.{}.",
    {
        "attn_q": "attention.self.query",
        "attn_k": "attention.self.key",
        "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense",
        "attn_output_norm": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense",
        "ffn_down": "output.dense",
        "layer_output_norm": "output.LayerNorm",
    },
)


def _t5_stack(before: str, after: str, ffn: int, up: str) -> Names:
    attention = {
        "attn_norm": "layer.0.layer_norm",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "cross_attn_norm": "layer.1.layer_norm",
        "ffn_norm": f"layer.{ffn}.layer_norm",
        "ffn_gate": f"layer.{ffn}.DenseReluDense.wi_0",
        "ffn_up": f"layer.{ffn}.DenseReluDense.{up}",
        "ffn_down": f"layer.{ffn}.DenseReluDense.wo",
    }
    for part in "qkvo":
        attention[f"attn_{part}"] = f"layer.0.SelfAttention.{part}"
        attention[f"cross_attn_{part}"] = f"layer.1.EncDecAttention.{part}"
    norm = {f"{before}.output_norm": f"{after}.final_layer_norm"}
    return norm | _layers(f"{before}.blk.{{}}.", f"{after}.block.{{}}.", attention)


def _t5_names(gated: bool) -> Names:
    up = "wi_1" if gated else "wi"
    ends = {"token_embd": "shared", "output": "lm_head"}
    return ends | _t5_stack("enc", "encoder", 1, up) | _t5_stack("dec", "decoder", 2, up)


class _Metadata:
    """What a file says of its architecture, checked as it is asked for."""

    def __init__(self, file: GGUF):
        self.file = file
        self.architecture = file.values.get("general.architecture")

    def _get(self, key: str, default: Any) -> Any:
        value = self.file.values.get(f"{self.architecture}.{key}", default)
        if hasattr(value, "tolist"):  # one number per layer
            numbers = set(value.tolist())
            value = numbers.pop() if len(numbers) == 1 else f"{len(numbers)} different values"
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._get(key, default)
        if type(value) is not int or not least <= value < 1 << 31:
            raise self.file.error(f"have an integer {key} from {least} on", repr(value))
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.file.error(f"have a positive {key}", repr(value))
        return float(f"{value:.7g}")  # 1e-5 again, which fp32 has not got

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.file.error(f"have a text {key}", type(value).__name__)
        return value

    def rows(self, tensor: str) -> int:
        if not self.file.has(tensor):
            raise self.file.error(f"have the tensor {tensor}", f"{len(self.file.tensors)} others")
        return self.file.tensors[tensor].shape[0]


def _common(meta: _Metadata) -> dict[str, Any]:
    ids = {}
    for name, stored in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        value = meta.file.values.get(f"tokenizer.ggml.{stored}_token_id")
        ids[f"{name}_token_id"] = value if type(value) is int else None
    tied = not meta.file.has("output.weight")
    return {"vocab_size": meta.rows("token_embd.weight"), "tie_word_embeddings": tied, **ids}


def _llama_config(meta: _Metadata) -> dict[str, Any]:
    kind = meta.architecture
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := meta.integer(key, head_dim)) != head_dim:
            raise meta.file.error(f"have {key} {head_dim}, as keys", other)
    config = _common(meta) | {
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.integer("context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.real("rope.freq_base", 10000.0),
        "attention_bias": meta.file.has("blk.0.attn_q.bias"),
        "mlp_bias": meta.file.has("blk.0.ffn_up.bias"),
    }
    config["rope_scaling"] = _rope_scaling(meta, config)
    if f"{kind}.attention.sliding_window" in meta.file.values:
        config["sliding_window"] = meta.integer("attention.sliding_window")
        # all layers have the window, as in llama.cpp
        config |= {"use_sliding_window": True, "max_window_layers": 0}
        kind = "mistral" if kind == "llama" else kind
    return config | {"model_type": kind, "architectures": [f"{str(kind).title()}ForCausalLM"]}


def _rope_scaling(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = meta.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise meta.file.error("scale rotary angles by none, linear or yarn", repr(kind))
    if meta.file.has("rope_freqs.weight"):
        return _llama3_scaling(meta, config)
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": meta.real("rope.scaling.factor")}
    if kind == "yarn":
        original = meta.integer("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, of which the file has only what every frequency is divided by."""
    low, high, original = 1.0, 4.0, 8192  # of every Llama 3
    head_dim = config["head_dim"]
    divisors = meta.file.read("rope_freqs.weight").double().flatten()
    if 2 * len(divisors) != head_dim:
        raise meta.file.error(f"have {head_dim // 2} rope_freqs", len(divisors))
    factor = float(f"{divisors.max():.4g}")
    powers = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = original * config["rope_theta"] ** -powers / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factor < 1 or not torch.allclose(divisors, expected, rtol=1e-3):
        raise meta.file.error("have the rope_freqs of Llama 3", f"up to {factor:g}")
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
    ends = {"high_freq_factor": high, "original_max_position_embeddings": original}
    return scaling | ends


def _gpt2_config(meta: _Metadata) -> dict[str, Any]:
    return _common(meta) | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": meta.integer("context_length"),
        "n_embd": meta.integer("embedding_length"),
        "n_layer": meta.integer("block_count"),
        "n_head": meta.integer("attention.head_count"),
        "n_inner": meta.integer("feed_forward_length"),
        "layer_norm_epsilon": meta.real("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _bert_config(meta: _Metadata) -> dict[str, Any]:
    return _common(meta) | {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": meta.integer("embedding_length"),
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": meta.integer("attention.head_count"),
        "max_position_embeddings": meta.rows("position_embd.weight"),
        "type_vocab_size": meta.rows("token_types.weight"),
        "layer_norm_eps": meta.real("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
    }


def _t5_config(meta: _Metadata) -> dict[str, Any]:
    layers = meta.integer("block_count")
    return _common(meta) | {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "d_model": meta.integer("embedding_length"),
        "d_kv": meta.integer("attention.key_length"),
        "d_ff": meta.integer("feed_forward_length"),
        "num_layers": layers,
        "num_decoder_layers": meta.integer("decoder_block_count", layers),
        "num_heads": meta.integer("attention.head_count"),
        "relative_attention_num_buckets": meta.integer("attention.relative_buckets_count"),
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": meta.real("attention.layer_norm_rms_epsilon"),
        "feed_forward_proj": "gated-gelu" if meta.file.has("enc.blk.0.ffn_gate.weight") else "relu",
        "decoder_start_token_id": meta.integer("decoder_start_token_id", 0, least=0),
    }


def _closest_scheme(kind: str) -> str | None:
    """Of ours, to a type of tensors; None for floating point."""
    bits = re.match(r"Q(\d)", kind)
    if bits is None:
        return None
    if int(bits[1]) > 4:
        return "int8"
    # _0 is symmetric, _1 and _K have a minimum of each block
    return "int4" if kind.endswith("_0") else "int4_asym"


def read_gguf(
    path: Path,
) -> tuple[dict[str, Any], Readers, dict[str, str], Callable[[], Any] | None]:
    """The config, the tensors, their schemes and, where its kind is known, the tokenizer of a file.

    Raises ValueError where the file is damaged or its architecture is another one than Llama
    (Mistral is one with a window), Qwen2, Qwen3, GPT-2, BERT or T5.
    """
    file = open_gguf(path)
    meta = _Metadata(file)
    architectures: dict[object, tuple[Callable[[_Metadata], dict[str, Any]], Names]] = {
        **dict.fromkeys(("llama", "qwen2", "qwen3"), (_llama_config, _LLAMA)),
        "gpt2": (_gpt2_config, _GPT2),
        "bert": (_bert_config, _BERT),
        "t5": (_t5_config, _t5_names(file.has("enc.blk.0.ffn_gate.weight"))),
    }
    if not isinstance(meta.architecture, str) or meta.architecture not in architectures:
        known = ", ".join(map(str, architectures))
        raise file.error(f"have an architecture of {known}", repr(meta.architecture))
    configure, names = architectures[meta.architecture]
    config = configure(meta)
    readers = {
        _rename(meta, name, names): _reader(file, name, config)
        for name in file.tensors
        if name != "rope_freqs.weight"  # stands in the config
    }
    schemes = {
        _rename(meta, name, names): scheme
        for name, stored in file.tensors.items()
        if name != "rope_freqs.weight" and (scheme := _closest_scheme(stored.kind)) is not None
    }
    kind = str(file.values.get("tokenizer.ggml.model"))
    return config, readers, schemes, partial(build_tokenizer, file) if kind in KINDS else None


def _rename(meta: _Metadata, name: str, names: Names) -> str:
    base, _, kind = name.rpartition(".")
    layer = _LAYER.search(base)
    general = _LAYER.sub("blk.{}.", base, count=1)
    if general not in names or "{}" in base or kind not in ("weight", "bias"):
        raise meta.file.error(f"have tensors of {meta.architecture} alone", name)
    if layer is None:
        return f"{names[general]}.{kind}"
    layers = meta.integer("block_count")
    if base.startswith("dec."):
        layers = meta.integer("decoder_block_count", layers)
    if int(layer[1]) >= layers:
        raise meta.file.error(f"have {layers} layers", name)
    return f"{names[general].format(layer[1])}.{kind}"


def _reader(file: GGUF, name: str, config: dict[str, Any]) -> Callable[[], Tensor]:
    """Reads a tensor in Hugging Face's layout."""
    read, shape = partial(file.read, name), file.tensors[name].shape
    part, kind = f".{name}".rsplit(".", 2)[1:]
    if config["model_type"] in ("llama", "mistral") and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if shape[0] != heads * config["head_dim"] or config["head_dim"] % 2:
            rule = f"have {heads} heads of even width {config['head_dim']} in {name}"
            raise file.error(rule, f"{shape[0]} rows")
        return lambda: halves(read(), heads)
    if part in _TRANSPOSED and kind == "weight" and config["model_type"] == "gpt2":
        return lambda: read().mT
    return read
