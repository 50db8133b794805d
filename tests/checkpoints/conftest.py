"""Tiny models of transformers, shared files, and files that are damaged at random."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos_fast.checkpoints.source import open_source

SHARED = Path("/work/shared/data/models")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
MODELS = {
    "llama": ("LlamaForCausalLM", GROUPED | {"rope_theta": 5000.0, "attention_bias": True}),
    "llama tied": ("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", SIZES),
    "bert": ("BertModel", SIZES | {"type_vocab_size": 3}),
    "t5": ("T5ForConditionalGeneration", {"tie_word_embeddings": True}),
    "t5 gated": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "num_decoder_layers": 3, "tie_word_embeddings": False}

# judged by its own examples, of which a few hundred take a second
fuzzed = settings(
    derandomize=True,
    max_examples=300,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
NUMBERS = [0, 1, 2, 8, 9, 255, 2**16, 10**8 + 1, *(2**n + d for n in (31, 32, 63) for d in (-1, 0))]


@pytest.fixture(scope="session")
def make_model():
    """make_model(name): a tiny random model of transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def make(name, **changes):
        cls, sizes = MODELS[name]
        model = getattr(transformers, cls)
        sizes = (T5 | sizes if name.startswith("t5") else sizes) | changes
        torch.manual_seed(0)
        return model(model.config_class(**sizes)).eval()

    return make


@pytest.fixture(scope="session")
def logits_of():
    """logits_of(source): the outputs of transformers' model of a source, for fixed tokens."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def outputs(model):
        tokens = torch.arange(24).view(2, 12) * 7 % model.config.vocab_size
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return model(tokens, **more)[0]

    def of(source):
        if isinstance(source, torch.nn.Module):
            return outputs(source)
        config = transformers.AutoConfig.for_model(**source.config)
        model = getattr(transformers, source.config["architectures"][0])(config).eval()
        missing, unexpected = model.load_state_dict(dict(source.tensors), strict=False)
        # names of tied weights, which no file has, and what GGUF leaves out
        assert all(n.startswith("pooler") or "embed_tokens" in n or "lm_head" in n for n in missing)
        assert not unexpected
        model.tie_weights()
        return outputs(model)

    return of


@pytest.fixture(scope="session")
def shared():
    """shared(name): a file of /work/shared, or a loud skip."""

    def path(name):
        if not (SHARED / name).is_file():
            pytest.skip(f"NOT CHECKED: {SHARED / name} is missing")
        return SHARED / name

    return path


@pytest.fixture
def read_or_refuse():
    """read_or_refuse(path): True where all was read, False after a ValueError of one line."""

    def read(path):
        try:
            source = open_source(path)
            for tensor in source.tensors.values():
                tensor.double().sum()
            if source.tokenizer is not None:
                source.tokenizer()
        except ValueError as refusal:
            error = refusal
        else:
            return True
        # its subclasses, as UnicodeDecodeError, are accidents
        assert type(error) is ValueError, repr(error)
        assert "must" in str(error)
        assert "\n" not in str(error)
        return False

    return read


@pytest.fixture
def memory_grows():
    """memory_grows(act): how many more bytes are resident while what act() returns is kept."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def grows(act):
        if not Path("/proc/self/statm").exists():
            pytest.skip("NOT CHECKED: no /proc/self/statm")
        before = resident()
        kept = act()
        after = resident()
        del kept
        return after - before

    return grows


def damages(size):
    """How a file of ``size`` bytes is damaged: its beginning, where the header is, more often."""
    place = st.one_of(st.integers(0, size - 1), st.integers(0, min(size - 1, 400)))
    cut = st.tuples(st.just("cut"), place, st.just(0))
    flip = st.tuples(st.just("flip"), place, st.integers(0, 7))
    write = st.tuples(st.just("write"), place, st.sampled_from(NUMBERS))
    letter = st.tuples(st.just("letter"), place, st.integers(0, 255))
    return st.lists(st.one_of(cut, flip, write, letter), min_size=1, max_size=3)


def damage(raw, steps):
    raw = bytearray(raw)
    for kind, at, value in steps:
        if kind == "cut":
            del raw[at:]
        elif at < len(raw):
            if kind == "flip":
                raw[at] ^= 1 << value
            elif kind == "letter":
                raw[at] = value
            else:
                raw[at : at + 8] = value.to_bytes(8, "little")
    return bytes(raw)


@pytest.fixture
def fuzz(read_or_refuse):
    """fuzz(path): damage a file in a few hundred ways; what is opened is it, or its folder.

    Returns how often everything was read (True) and how often a ValueError was raised (False).
    """

    def run(path, opened=None):
        raw = path.read_bytes()
        results = {True: 0, False: 0}

        @fuzzed
        @given(damages(len(raw)))
        def attempt(steps):
            path.unlink()  # the old content may still be mapped
            path.write_bytes(damage(raw, steps))
            results[read_or_refuse(opened or path)] += 1

        attempt()
        return results

    return run


@pytest.fixture
def finish():
    """finish(writer): write the file of a gguf.GGUFWriter."""

    def write(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


@pytest.fixture
def bare_llama(tmp_path, finish):
    """bare_llama(tensors, add): the GGUF file of an embedding and what is added.

    tensors: by name, an array and its type; add(writer) adds metadata
    """
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")

    def write(tensors=None, add=None):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_embedding_length(512)
        writer.add_feed_forward_length(64)
        writer.add_head_count(8)
        writer.add_layer_norm_rms_eps(1e-5)
        if add is not None:
            add(writer)
        writer.add_tensor("token_embd.weight", np.ones((3, 512), np.float32))
        for name, (value, kind) in (tensors or {}).items():
            writer.add_tensor(name, value, raw_dtype=kind)
        finish(writer)
        return path

    return write
