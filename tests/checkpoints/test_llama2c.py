"""llama2.c's files, against the reading of benchmarks/stories260k.py and transformers."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from llmos_fast.checkpoints.source import open_source

SIZES = (16, 24, 2, 4, 2, 20, 6)
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "stories260k.py"


def in_pairs(rows, heads):
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(path, state, sizes=SIZES, tied=True, versioned=False):
    """As llama2.c's export.py orders the weights of a Llama of transformers."""
    _, _, layers, heads, kv_heads, vocabulary, length = sizes

    def all_of(part, pairs=0):
        rows = [state[f"model.layers.{i}.{part}.weight"] for i in range(layers)]
        return [in_pairs(r, pairs) if pairs else r for r in rows]

    embedding, norm = [state["model.embed_tokens.weight"]], [state["model.norm.weight"]]
    norms = all_of("input_layernorm"), all_of("post_attention_layernorm")
    attention = all_of("self_attn.q_proj", heads) + all_of("self_attn.k_proj", kv_heads)
    attention += all_of("self_attn.v_proj") + all_of("self_attn.o_proj")
    ffn = all_of("mlp.gate_proj") + all_of("mlp.down_proj") + all_of("mlp.up_proj")
    projection = [] if tied else [state["lm_head.weight"]]
    if versioned:
        head = struct.pack("<2i7iB", 0x616B3432, 1, *sizes, tied).ljust(256, b"\0")
        weights = [*norms[0], *norms[1], *norm, *embedding, *attention, *ffn, *projection]
    else:
        head = struct.pack("<7i", *sizes[:5], vocabulary if tied else -vocabulary, length)
        angles = [torch.full((length, sizes[0] // heads), 7.0)]
        weights = [*embedding, *norms[0], *attention, *norms[1], *ffn, *norm, *angles, *projection]
    path.write_bytes(head + b"".join(np.asarray(w, "<f4").tobytes() for w in weights))
    return path


@pytest.fixture
def llama(make_model):
    dim, hidden, layers, heads, kv_heads, vocabulary, length = SIZES

    def make(tied):
        return make_model(
            "llama",
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=length,
            tie_word_embeddings=tied,
            attention_bias=False,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
        )

    return make


@pytest.fixture(scope="module")
def benchmark_reader():
    pytest.importorskip("transformers", reason="transformers is not installed")
    spec = importlib.util.spec_from_file_location("stories260k", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("versioned", [True, False])
def test_a_written_model_is_read(tied, versioned, tmp_path, llama, logits_of):
    model = llama(tied)
    state = model.state_dict()
    source = open_source(write(tmp_path / "m.bin", state, tied=tied, versioned=versioned))
    expected = state.keys() - ({"lm_head.weight"} if tied else set())
    assert source.tensors.keys() == expected
    for name, tensor in source.tensors.items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits_of(source), logits_of(model))
    assert source.folder == tmp_path
    assert source.tokenizer is None


@pytest.mark.parametrize("name", ["stories260k/stories260K.bin", "babyllama_tok105/model5000.bin"])
def test_trained_models_are_those_of_the_benchmarks(name, shared, benchmark_reader, logits_of):
    path = shared(name)
    source, model = open_source(path), benchmark_reader(path)
    state = model.state_dict()
    assert source.tensors.keys() == state.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in source.tensors.items())
    assert torch.equal(logits_of(source), logits_of(model))


def test_opening_reads_no_tensor_and_writing_changes_no_file(tmp_path, memory_grows):
    sizes = (4096, 4096, 1, 32, 32, 8192, 16)
    layer = 2 * 4096 + 4 * 4096**2 + 3 * 4096**2
    count = 8192 * 4096 + layer + 4096 + 16 * 128
    path = tmp_path / "m.bin"
    with path.open("wb") as file:
        file.write(struct.pack("<7i", *sizes))
        file.truncate(28 + 4 * count)

    def act():
        source = open_source(path)
        assert len(source.tensors) == 11
        return source.tensors["model.layers.0.self_attn.v_proj.weight"]

    assert memory_grows(act) < 64 << 20
    weight = act()
    weight[0, 0] = 1
    assert act()[0, 0] == 0


@pytest.mark.parametrize(
    ("place", "value"),
    [(i, v) for i in range(7) for v in (0, -1, 3, 2**31 - 1, -(2**31))],
)
def test_wrong_sizes_are_refused(place, value, tmp_path, llama, read_or_refuse):
    path = write(tmp_path / "m.bin", llama(True).state_dict())
    sizes = list(SIZES)
    sizes[place] = value
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(struct.pack("<7i", *sizes) + raw[28:])
    assert not read_or_refuse(path)


@pytest.mark.parametrize("length", [0, 3, 4, 27, 28, -4, -1, 1])
@pytest.mark.parametrize("versioned", [True, False])
def test_other_lengths_are_refused(length, versioned, tmp_path, llama, read_or_refuse):
    path = write(tmp_path / "m.bin", llama(True).state_dict(), versioned=versioned)
    raw = path.read_bytes()
    path.write_bytes(raw + b"\0" if length == 1 else raw[:length])
    assert not read_or_refuse(path)


def test_other_versions_are_refused(tmp_path, llama):
    path = write(tmp_path / "m.bin", llama(True).state_dict(), versioned=True)
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + struct.pack("<i", 2) + raw[8:])
    with pytest.raises(ValueError, match="version 0 or 1, got 2"):
        open_source(path)


def test_a_width_that_looks_like_a_pickle_is_read(tmp_path):
    sizes = (640, 1, 1, 1, 1, 1, 1)
    count = 640 + 2 * 640 + 4 * 640**2 + 3 * 640 + 640 + 640
    path = tmp_path / "m.bin"
    path.write_bytes(struct.pack("<7i", *sizes) + bytes(4 * count))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert open_source(path).config["hidden_size"] == 640


@pytest.mark.parametrize("versioned", [True, False])
def test_files_damaged_at_random_are_read_or_refused(versioned, tmp_path, llama, fuzz):
    state = llama(False).state_dict()
    results = fuzz(write(tmp_path / "m.bin", state, tied=False, versioned=versioned))
    assert min(results.values()) > 20
