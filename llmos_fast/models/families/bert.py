"""BERT (Devlin et al. 2019)."""

from __future__ import annotations

from typing import Any

from llmos_fast.models.config import ModelConfig
from llmos_fast.models.encoder_model import EncoderModel
from llmos_fast.models.family import Family, Reader, both

_LAYER, _THEIRS = "stack.blocks.{}", "encoder.layer.{}"
_HEADS = {
    "BertModel": ("pooler",),
    "BertForMaskedLM": ("mlm",),
    "BertForPreTraining": ("pooler", "mlm", "next"),
    "BertForSequenceClassification": ("pooler", "sequence"),
    "BertForTokenClassification": ("token",),
}


def _config(hf: dict[str, Any]) -> ModelConfig:
    read = Reader(hf)
    read.unsupported(position_embedding_type="absolute", is_decoder=False)
    width, heads, head_dim = read.heads("hidden_size", "num_attention_heads", (768, 12))
    labels = hf.get("id2label")
    return ModelConfig(
        vocabulary=read.integer("vocab_size", 30522),
        width=width,
        layers=read.integer("num_hidden_layers", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        inner=read.integer("intermediate_size", 3072),
        max_length=read.integer("max_position_embeddings", 512),
        norm="layer",
        norm_eps=read.number("layer_norm_eps", 1e-12),
        norm_first=False,
        activation=read.activation("hidden_act", "gelu"),
        qkv_bias=True,
        out_bias=True,
        inner_bias=True,
        learned_positions=True,
        token_types=read.integer("type_vocab_size", 2),
        labels=len(labels) if isinstance(labels, dict) else read.integer("num_labels", 2),
        dropout=read.number("hidden_dropout_prob", 0.1),
        attention_dropout=read.number("attention_probs_dropout_prob", 0.1),
    )


def _build(config: ModelConfig, hf: dict[str, Any]) -> EncoderModel:
    given = hf.get("architectures") or ["BertModel"]
    known = [name for name in _HEADS if given == [name]]
    if not known:
        names = ", ".join(_HEADS)
        raise ValueError(f"load: architectures must be a list of one of {names}, got {given!r}")
    return EncoderModel(config, _HEADS[known[0]])


FAMILY = Family(
    config=_config,
    build=_build,
    names={
        "embedding.weight": ("embeddings.word_embeddings.weight",),
        "positions.weight": ("embeddings.position_embeddings.weight",),
        "token_types.weight": ("embeddings.token_type_embeddings.weight",),
        **both("embedding_norm", "embeddings.LayerNorm"),
        **both(
            f"{_LAYER}.attention.qkv",
            tuple(f"{_THEIRS}.attention.self.{name}" for name in ("query", "key", "value")),
        ),
        **both(f"{_LAYER}.attention.out", f"{_THEIRS}.attention.output.dense"),
        **both(f"{_LAYER}.attention_norm", f"{_THEIRS}.attention.output.LayerNorm"),
        **both(f"{_LAYER}.ffn.linear1", f"{_THEIRS}.intermediate.dense"),
        **both(f"{_LAYER}.ffn.linear2", f"{_THEIRS}.output.dense"),
        **both(f"{_LAYER}.ffn_norm", f"{_THEIRS}.output.LayerNorm"),
        **both("pooler", "pooler.dense"),
        **both("transform", "cls.predictions.transform.dense"),
        **both("transform_norm", "cls.predictions.transform.LayerNorm"),
        "head.weight": ("cls.predictions.decoder.weight",),
        "head.bias": ("cls.predictions.bias",),
        **both("next_sentence", "cls.seq_relationship"),
        **both("classifier", "classifier"),
    },
    prefix="bert.",
    bare=("cls.", "classifier."),
    ignored=(
        r"embeddings\.position_ids",
        r"cls\.predictions\.decoder\.bias",
        # of heads that a model was trained with, but is not used with
        r"pooler\..*",
        r"cls\.seq_relationship\..*",
    ),
    older={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
)
