"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

from llmos_fast.models.causal_lm import CausalLM
from llmos_fast.models.config import ModelConfig
from llmos_fast.models.family import Family, Reader, both

_LAYER = "stack.blocks.{}"


def _config(hf: dict[str, Any]) -> ModelConfig:
    read = Reader(hf)
    read.unsupported(
        add_cross_attention=False, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True
    )
    width, heads, head_dim = read.heads("n_embd", "n_head", (768, 12))
    return ModelConfig(
        vocabulary=read.integer("vocab_size", 50257),
        width=width,
        layers=read.integer("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        inner=read.integer("n_inner", 4 * width),
        max_length=read.integer("n_positions", 1024),
        norm="layer",
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        activation=read.activation("activation_function", "gelu_new"),
        qkv_bias=True,
        out_bias=True,
        inner_bias=True,
        learned_positions=True,
        tied=read.flag("tie_word_embeddings", True),
        dropout=read.number("resid_pdrop", 0.1),
        attention_dropout=read.number("attn_pdrop", 0.1),
    )


FAMILY = Family(
    config=_config,
    build=lambda config, hf: CausalLM(config),
    names={
        "embedding.weight": ("wte.weight",),
        "positions.weight": ("wpe.weight",),
        "head.weight": ("lm_head.weight",),
        **both(f"{_LAYER}.attention_norm", "h.{}.ln_1"),
        **both(f"{_LAYER}.attention.qkv", "h.{}.attn.c_attn"),
        **both(f"{_LAYER}.attention.out", "h.{}.attn.c_proj"),
        **both(f"{_LAYER}.ffn_norm", "h.{}.ln_2"),
        **both(f"{_LAYER}.ffn.linear1", "h.{}.mlp.c_fc"),
        **both(f"{_LAYER}.ffn.linear2", "h.{}.mlp.c_proj"),
        **both("stack.norm", "ln_f"),
    },
    prefix="transformer.",
    bare=("lm_head.",),
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
    transposed=(".qkv.weight", ".out.weight", ".linear1.weight", ".linear2.weight"),
)
