"""Tiny models of transformers, saved; and what can be wrong with their files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
T5 = {"vocab_size": 97, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", SIZES),
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "llama odd": ("LlamaForCausalLM", GROUPED | {"intermediate_size": 72}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 16, "attention_bias": True}),
    "bert": ("BertForPreTraining", SIZES),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 gated": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
}


@pytest.fixture
def saved(tmp_path):
    """saved(name): a tiny model of transformers, saved to the folder ``model``."""

    def save(name, dtype=torch.float32):
        torch.manual_seed(0)
        architecture, options = MODELS[name]
        cls = getattr(transformers, architecture)
        model = cls(cls.config_class(**options, initializer_range=0.1)).to(dtype).eval()
        model.save_pretrained(tmp_path / "model")
        return model

    return save


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


@pytest.fixture
def change_config():
    """change_config(folder, name=value, ...): of its config.json."""

    def call(folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return call


@pytest.fixture
def change_tensors():
    """change_tensors(folder, change): change(tensors) of its file, which is written anew."""

    def call(folder, change):
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        path.unlink()  # the old content may still be mapped
        save_file(tensors, path, {"format": "pt"})

    return call


@pytest.fixture
def refused():
    """refused(act, match): act() raises a plain ValueError; its subclasses are accidents."""

    def call(act, match="must"):
        with pytest.raises(ValueError, match=match) as caught:
            act()
        assert type(caught.value) is ValueError

    return call


@pytest.fixture
def config_of():
    """config_of(name): the config of a tiny model."""

    def call(name):
        architecture, options = MODELS[name]
        return getattr(transformers, architecture).config_class(**options).to_dict()

    return call
