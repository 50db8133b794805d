"""Llama (Touvron et al. 2023) and what differs from it by configuration: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from llmos_fast.models.causal_lm import CausalLM
from llmos_fast.models.config import ModelConfig, Rotary
from llmos_fast.models.family import Family, Reader, both

_LAYER = "stack.blocks.{}"


def _config(hf: dict[str, Any]) -> ModelConfig:
    read, kind = Reader(hf), hf["model_type"]
    width, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    head_dim = read.integer("head_dim", 128 if kind == "qwen3" else max(1, width // heads))
    layers, biased = read.integer("num_hidden_layers"), read.flag("attention_bias", False)
    return ModelConfig(
        vocabulary=read.integer("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=read.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        inner=read.integer("intermediate_size"),
        max_length=read.integer("max_position_embeddings", 2048),
        norm="rms",
        norm_eps=read.number("rms_norm_eps", 1e-6),
        activation=read.activation("hidden_act", "silu"),
        gated=True,
        qkv_bias=biased or kind == "qwen2",
        out_bias=biased,
        inner_bias=read.flag("mlp_bias", False),
        qk_norm=kind == "qwen3",
        rotary=_rotary(hf, read, head_dim),
        windows=_windows(hf, read, layers),
        tied=read.flag("tie_word_embeddings", False),
        attention_dropout=read.number("attention_dropout", 0.0),
    )


def _rotary(hf: dict[str, Any], read: Reader, head_dim: int) -> Rotary:
    """Of "rope_parameters", or of what older files have in its place."""
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"load: rope_parameters of config.json must be an object, got {scaling!r}")
    base = Reader(scaling).number("rope_theta", read.number("rope_theta", 10000.0))
    if not base > 1:
        raise ValueError(f"load: rope_theta of config.json must be above 1, got {base}")
    share = Reader(scaling).number("partial_rotary_factor", 1.0)
    return Rotary(base=base, dim=int(head_dim * share) // 2 * 2, scaling=scaling)


def _windows(hf: dict[str, Any], read: Reader, layers: int) -> tuple[int | None, ...]:
    """Sliding windows, layer by layer."""
    on = hf["model_type"] == "mistral" or read.flag("use_sliding_window", False)
    if not on or hf.get("sliding_window") is None:
        return ()
    size, kinds = read.integer("sliding_window"), hf.get("layer_types")
    if kinds is None:
        mistral = hf["model_type"] == "mistral"
        first = 0 if mistral else read.integer("max_window_layers", 28, least=0)
        return tuple(size if i >= first else None for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"load: layer_types of config.json must be a list of {layers} names")
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


FAMILY = Family(
    config=_config,
    build=lambda config, hf: CausalLM(config),
    names={
        "embedding.weight": ("model.embed_tokens.weight",),
        "head.weight": ("lm_head.weight",),
        **both(
            f"{_LAYER}.attention.qkv",
            tuple(f"model.layers.{{}}.self_attn.{letter}_proj" for letter in "qkv"),
        ),
        **both(f"{_LAYER}.attention.out", "model.layers.{}.self_attn.o_proj"),
        f"{_LAYER}.attention.q_norm.weight": ("model.layers.{}.self_attn.q_norm.weight",),
        f"{_LAYER}.attention.k_norm.weight": ("model.layers.{}.self_attn.k_norm.weight",),
        f"{_LAYER}.attention_norm.weight": ("model.layers.{}.input_layernorm.weight",),
        f"{_LAYER}.ffn_norm.weight": ("model.layers.{}.post_attention_layernorm.weight",),
        **both(f"{_LAYER}.ffn.linear1", "model.layers.{}.mlp.gate_proj"),
        **both(f"{_LAYER}.ffn.linear_up", "model.layers.{}.mlp.up_proj"),
        **both(f"{_LAYER}.ffn.linear2", "model.layers.{}.mlp.down_proj"),
        "stack.norm.weight": ("model.norm.weight",),
    },
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
