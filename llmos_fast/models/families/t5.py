"""T5 (Raffel et al. 2020) and its later, gated form."""

from __future__ import annotations

from typing import Any

from llmos_fast.models.config import ModelConfig
from llmos_fast.models.encoder_decoder import EncoderDecoder
from llmos_fast.models.family import ACTIVATIONS, Family, Reader

_ATTENTION = ("q", "k", "v")


def _config(hf: dict[str, Any]) -> ModelConfig:
    read = Reader(hf)
    width, layers = read.integer("d_model", 512), read.integer("num_layers", 6)
    heads = read.integer("num_heads", 8)
    gated, activation = _activation(hf)
    tied = read.flag("tie_word_embeddings", True)
    return ModelConfig(
        vocabulary=read.integer("vocab_size", 32128),
        width=width,
        layers=read.integer("num_decoder_layers", layers),
        encoder_layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=read.integer("d_kv", 64),
        inner=read.integer("d_ff", 2048),
        max_length=None,
        norm="rms",
        norm_eps=read.number("layer_norm_epsilon", 1e-6),
        activation=activation,
        gated=gated,
        relative_buckets=read.integer("relative_attention_num_buckets", 32),
        relative_max_distance=read.integer("relative_attention_max_distance", 128),
        scale=1.0,
        tied=tied,
        head_scale=width**-0.5 if read.flag("scale_decoder_outputs", tied) else 1.0,
        dropout=read.number("dropout_rate", 0.1),
        attention_dropout=read.number("dropout_rate", 0.1),
    )


def _activation(hf: dict[str, Any]) -> tuple[bool, str]:
    name = str(hf.get("feed_forward_proj") or "relu")
    gated, short = name.startswith("gated-"), name.removeprefix("gated-")
    # "gated-gelu" means the tanh form, whatever its name says
    short = "gelu_new" if name == "gated-gelu" else short
    if short not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"load: feed_forward_proj must be one of {known}, or gated, got {name!r}")
    return gated, ACTIVATIONS[short]


def _stack(ours: str, theirs: str, *, gated: bool, cross: bool) -> dict[str, tuple[str, ...]]:
    block, last = f"{theirs}.block.{{}}.layer", 2 if cross else 1
    names = {
        "attention_norm.weight": (f"{block}.0.layer_norm.weight",),
        "attention.qkv.weight": tuple(f"{block}.0.SelfAttention.{n}.weight" for n in _ATTENTION),
        "attention.out.weight": (f"{block}.0.SelfAttention.o.weight",),
        "ffn_norm.weight": (f"{block}.{last}.layer_norm.weight",),
        "ffn.linear2.weight": (f"{block}.{last}.DenseReluDense.wo.weight",),
    }
    for name, source in (("linear1", "wi_0" if gated else "wi"), ("linear_up", "wi_1")):
        names[f"ffn.{name}.weight"] = (f"{block}.{last}.DenseReluDense.{source}.weight",)
    if cross:
        attention = f"{block}.1.EncDecAttention"
        names |= {
            "cross_norm.weight": (f"{block}.1.layer_norm.weight",),
            "cross_attention.q.weight": (f"{attention}.q.weight",),
            "cross_attention.kv.weight": (f"{attention}.k.weight", f"{attention}.v.weight"),
            "cross_attention.out.weight": (f"{attention}.o.weight",),
        }
    bias = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        **{f"{ours}.blocks.{{}}.{name}": sources for name, sources in names.items()},
        f"{ours}.norm.weight": (f"{theirs}.final_layer_norm.weight",),
        f"{ours}_bias.table": (bias,),
    }


def family(hf: dict[str, Any]) -> Family:
    """T5's names depend on whether its networks are gated."""
    gated, _ = _activation(hf)
    return Family(
        config=_config,
        build=lambda config, hf: EncoderDecoder(config),
        names={
            "embedding.weight": ("shared.weight",),
            "head.weight": ("lm_head.weight",),
            **_stack("encoder", "encoder", gated=gated, cross=False),
            **_stack("decoder", "decoder", gated=gated, cross=True),
        },
        ignored=(
            r"(encoder|decoder)\.embed_tokens\.weight",
            # older files keep a bias that is not used
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        ),
    )
