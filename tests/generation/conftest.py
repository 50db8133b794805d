"""Tiny random models whose choices vary, and the same ones in transformers."""

import pytest
import torch

from llmos_fast.models import build

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 61}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
MODELS = {
    "llama": LLAMA,
    "gpt2": GPT2 | {"model_type": "gpt2", "eos_token_id": None},
    "mistral": LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "t5": T5 | {"model_type": "t5", "decoder_start_token_id": 0, "eos_token_id": None},
}


@pytest.fixture(scope="session")
def tiny():
    """tiny(name, seed=0, **changes of its config): a model."""

    def make(name="llama", seed=0, **changes):
        torch.manual_seed(seed)
        model = build(MODELS[name] | changes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        return model

    return make


@pytest.fixture
def theirs(tmp_path):
    """theirs(model): transformers' model of the same weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def opened(model):
        model.save(tmp_path / "theirs")
        kind = "Seq2SeqLM" if model.config.encoder_layers else "CausalLM"
        cls = getattr(transformers, f"AutoModelFor{kind}")
        return cls.from_pretrained(tmp_path / "theirs").eval()

    return opened


@pytest.fixture
def their_tokens(theirs):
    """their_tokens(model, prompt, length, **options): what transformers' generate adds."""

    def generated(model, prompt, length, **options):
        peer = theirs(model)
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
        with torch.no_grad():
            out = peer.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, **options
            )
        return out[0, 1 if model.config.encoder_layers else len(prompt) :].tolist()

    return generated
