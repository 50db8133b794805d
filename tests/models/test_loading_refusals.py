"""Checkpoints and configs that load refuses, with a sentence."""

import json
import math

import pytest
import torch

from llmos_fast.models import build, load

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


TENSORS = {
    "missing": lambda t: t.pop("model.layers.1.mlp.down_proj.weight"),
    "missing part": lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
    "extra": lambda t: t.update({"model.layers.2.mlp.down_proj.weight": torch.ones(48, 80)}),
    "wrong shape": lambda t: t.update({"model.norm.weight": torch.ones(47)}),
    "transposed": lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(80, 48)}),
    "vector": lambda t: t.update({"model.embed_tokens.weight": torch.ones(97 * 48)}),
    "scalar part": lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(())}),
    "integers": lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int64)}),
    "integer part": lambda t: t.update(
        {"model.layers.0.self_attn.q_proj.weight": torch.ones(48, 48, dtype=torch.int8)}
    ),
    "parts that only add up": lambda t: t.update(
        {
            "model.layers.0.self_attn.q_proj.weight": torch.ones(24, 48),
            "model.layers.0.self_attn.k_proj.weight": torch.ones(48, 48),
        }
    ),
}


@pytest.mark.parametrize("scheme", [None, "int8"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name, scheme, saved, folder, change_tensors, refused):
    saved("llama")
    change_tensors(folder, TENSORS[name])
    refused(lambda: load(folder, scheme=scheme))


ABSURD = [0, -1, 10**30, 10**400, True, 1.5, "8", [8], {}, math.nan, math.inf]
NUMBERS = {
    "llama": [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ],
    "gpt2": ["vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"],
    "bert": [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    ],
    "t5": [
        "vocab_size",
        "d_model",
        "num_layers",
        "num_decoder_layers",
        "num_heads",
        "d_kv",
        "d_ff",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    ],
}


@pytest.mark.parametrize(("model", "name"), [(m, n) for m, names in NUMBERS.items() for n in names])
def test_absurd_sizes_are_refused(model, name, refused, config_of):
    config = config_of(model)
    for value in ABSURD:
        refused(lambda value=value: build(config | {name: value}, "meta"))


@pytest.mark.parametrize(
    ("model", "name", "values"),
    [
        ("llama", "rms_norm_eps", [0, -1, 10**30, 10**400, "1", [1], math.nan, math.inf]),
        ("gpt2", "layer_norm_epsilon", [0, -1, 10**30, "1", [1], math.nan]),
        ("llama", "attention_dropout", [-1, 1, 10**400, "1", math.nan]),
        ("bert", "hidden_dropout_prob", [-1, 1, math.nan]),
        ("t5", "dropout_rate", [-1, 1, math.nan]),
        ("llama", "tie_word_embeddings", [1, "true", []]),
        ("llama", "attention_bias", [1, "true", [1]]),
        ("llama", "hidden_act", ["tanh", ["silu"], 1, {"a": 1}]),
        ("t5", "feed_forward_proj", ["tanh", "gated-", ["relu"], 1]),
        ("bert", "position_embedding_type", ["relative_key", 1]),
        ("bert", "architectures", ["BertModel", ["BertForNothing"], {"a": 1}, 1, [[]], [1]]),
        ("gpt2", "scale_attn_by_inverse_layer_idx", [True, "x"]),
        ("llama", "model_type", ["falcon", "", 1, [], {}, None]),
        ("llama", "rope_parameters", ["linear", 1, [1]]),
    ],
)
def test_absurd_options_are_refused(model, name, values, refused, config_of):
    config = config_of(model)
    for value in values:
        refused(lambda value=value: build(config | {name: value}, "meta"))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 5},
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"num_key_value_heads": 8},
    ],
)
def test_heads_that_do_not_divide_are_refused(changes, refused, config_of):
    model = "gpt2" if changes == {"num_attention_heads": 5} else "llama"
    changes = {"n_head": 5} if model == "gpt2" else changes
    refused(lambda: build(config_of(model) | changes, "meta"))


COMPLETE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 2.0},
}
OPTIONAL = ["beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"]
ROPES = [{"rope_type": kind} for kind in (*COMPLETE, "longrope", "", 1, ["linear"], {})]
ROPES += [
    {"rope_type": kind, **options, name: value}
    for kind, options in COMPLETE.items()
    for name in options
    for value in (0, -1, 10**400, "2", [2], math.nan, math.inf, None)
]
ROPES += [
    {"rope_type": "yarn", "factor": 2.0, name: value}
    for name in OPTIONAL
    for value in (0, -1, 10**400, "2", [2], math.nan, math.inf)
]
ROPES += [
    {"rope_type": "yarn", "factor": 2.0, "mscale": "1", "mscale_all_dim": 1.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {"rope_theta": 0.0},
    {"rope_theta": 1.0},
    {"rope_theta": "1"},
    {"partial_rotary_factor": 0.0},
    {"partial_rotary_factor": 1.5},
    {"partial_rotary_factor": math.nan},
]


def test_rotary_positions_that_are_unknown_or_incomplete_are_refused(refused, config_of):
    config = config_of("llama")
    for kind, options in COMPLETE.items():
        build(config | {"rope_parameters": {"rope_type": kind, **options}}, "meta")
    for rope in ROPES:
        refused(lambda r=rope: build(config | {"rope_parameters": r}, "meta"))


@pytest.mark.parametrize("stored", [{"quant_method": "gptq", "bits": 4}, {}, "int8", [1], True])
def test_foreign_quantized_checkpoints_are_refused(stored, saved, folder, change_config, refused):
    saved("llama")
    change_config(folder, quantization_config=stored)
    refused(lambda: load(folder), "quant_method")


def test_a_quantized_checkpoint_is_not_quantized_again(saved, folder, tmp_path, refused):
    saved("llama")
    load(folder, scheme="int8").save(tmp_path / "quantized")
    refused(lambda: load(tmp_path / "quantized", scheme="int4"), "scheme must be None")


@pytest.mark.parametrize("options", [{"scheme": "int3"}, {"group_size": 33}, {"method": "best"}])
def test_unknown_ways_to_quantize_are_refused(options, saved, folder, refused):
    saved("llama")
    refused(lambda: load(folder, **{"scheme": "int4"} | options))


OUT = "stack.blocks.0.attention.out"
STATES = {
    "nan scale": lambda t: t[f"{OUT}.scales"].fill_(math.nan),
    "no scales": lambda t: t.pop(f"{OUT}.scales"),
    "no scheme": lambda t: t.pop(f"{OUT}._extra_state"),
    "extra": lambda t: t.update({"stack.more": torch.ones(2)}),
    "short": lambda t: t.update({f"{OUT}.packed": t[f"{OUT}.packed"][:1].clone()}),
    "other words": lambda t: t.update({f"{OUT}.packed": t[f"{OUT}.packed"].flatten()}),
    "other integers": lambda t: t.update({f"{OUT}.packed": t[f"{OUT}.packed"].view(torch.int8)}),
    "wide scales": lambda t: t.update({f"{OUT}.scales": t[f"{OUT}.scales"].double()}),
    "other scheme": lambda t: t.update(
        {f"{OUT}._extra_state": torch.tensor(list(b"nf4"), dtype=torch.uint8)}
    ),
    "no text": lambda t: t.update(
        {f"{OUT}._extra_state": torch.tensor([255, 254], dtype=torch.uint8)}
    ),
    "large letters": lambda t: t.update({f"{OUT}._extra_state": torch.tensor([1000, -1])}),
    "no letters": lambda t: t.update({f"{OUT}._extra_state": torch.ones(3)}),
    "integer norm": lambda t: t.update({"stack.norm.weight": torch.ones(48, dtype=torch.int32)}),
    "short norm": lambda t: t.update({"stack.norm.weight": torch.ones(47)}),
}


@pytest.mark.parametrize("name", STATES)
def test_damaged_quantized_checkpoints_are_refused(
    name, saved, folder, tmp_path, change_tensors, refused
):
    saved("llama")
    load(folder, scheme="int4").save(tmp_path / "quantized")
    change_tensors(tmp_path / "quantized", STATES[name])
    refused(lambda: load(tmp_path / "quantized"), "must|damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "int3"},
        {"scheme": ["int4"]},
        {"scheme": "nf4"},
        {"group_size": 0},
        {"group_size": "32"},
        {"group_size": 64},
        {"layers": {"nothing": "int8"}},
        {"layers": {OUT: "int8"}},
        {"layers": {OUT: []}},
        {"layers": [OUT]},
        {"embeddings": False},
        {"embeddings": 1},
        {"skip": "head"},
        {"skip": ["head"]},
        {"skip": [1]},
        {"more": 1},
    ],
    ids=str,
)
def test_damaged_records_of_how_weights_are_quantized_are_refused(
    change, saved, folder, tmp_path, change_config, refused
):
    saved("llama")
    quantized = tmp_path / "quantized"
    load(folder, scheme="int4").save(quantized)
    stored = json.loads((quantized / "config.json").read_text())["quantization_config"]
    change_config(quantized, quantization_config=stored | change)
    refused(lambda: load(quantized), "must|damaged")
    change_config(quantized, quantization_config={"quant_method": "llmos_fast"})
    refused(lambda: load(quantized), "must|damaged")


def test_pickles_are_refused(saved, folder, refused):
    saved("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(lambda: load(folder), "pickle")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
