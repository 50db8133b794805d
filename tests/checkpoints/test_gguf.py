"""GGUF files: llama.cpp's names and layouts undone, its blocks decoded."""

import struct
import sys

import numpy as np
import pytest
import torch
from torch import nn

from llmos_fast import dequantize_, load
from llmos_fast.checkpoints.source import open_source

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
quants = gguf.quants
Type = gguf.GGMLQuantizationType

FAMILIES = ["llama", "llama tied", "mistral", "qwen2", "qwen3", "gpt2", "bert", "t5", "t5 gated"]
ARCHITECTURE = {"llama tied": "llama", "mistral": "llama", "t5 gated": "t5"}


def permuted(rows, heads):
    """As convert_hf_to_gguf.py has it."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2)


def convert(writer, name, model, kind=None):
    """What llama.cpp's convert_hf_to_gguf.py writes of a model, by gguf's own table of names."""
    config, architecture = model.config, ARCHITECTURE.get(name, name)
    layers = getattr(config, "num_hidden_layers", 2)
    writer.add_block_count(layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_embedding_length(config.hidden_size)
    if architecture == "t5":
        writer.add_feed_forward_length(config.d_ff)
        writer.add_key_length(config.d_kv)
        writer.add_value_length(config.d_kv)
        writer.add_decoder_block_count(config.num_decoder_layers)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
        writer.add_decoder_start_token_id(config.decoder_start_token_id)
    else:
        writer.add_context_length(config.max_position_embeddings)
        inner = 4 * config.hidden_size if name == "gpt2" else config.intermediate_size
        writer.add_feed_forward_length(inner)
    if name in ("gpt2", "bert"):
        eps = config.layer_norm_epsilon if name == "gpt2" else config.layer_norm_eps
        writer.add_layer_norm_eps(eps)
    elif architecture != "t5":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if name == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if name == "mistral":
        writer.add_sliding_window(config.sliding_window)

    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture)
    names = gguf.get_tensor_name_map(arch, max(layers, 3))
    tied = {id(model.get_input_embeddings().weight)}
    for key, tensor in model.named_parameters(remove_duplicate=False):
        if "pooler" in key or (key != "shared.weight" and "embed_tokens" in key and "t5" in name):
            continue
        # a gated T5 has a projection of its own, though transformers 5 makes it the embedding
        if "lm_head" in key and id(tensor) in tied and name != "t5 gated":
            continue
        value = tensor.detach().numpy()
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            value = permuted(value, heads).reshape(value.shape)
        if name == "gpt2" and ".c_" in key and key.endswith("weight"):
            value = value.T
        value = np.ascontiguousarray(value)
        stored = kind if value.ndim == 2 and kind else Type.F32
        if callable(stored):
            stored = stored(names.get_name(key, (".weight", ".bias")).removesuffix(".weight"))
        if stored in (Type.F32, Type.F16):
            value = quants.quantize(value, stored)
            writer.add_tensor(names.get_name(key, (".weight", ".bias")), value)
        else:
            value = quants.quantize(value, stored)
            writer.add_tensor(names.get_name(key, (".weight", ".bias")), value, raw_dtype=stored)


@pytest.fixture
def written(tmp_path, make_model, finish):
    """written(name, kind): a tiny model, and the path of its GGUF file."""

    def write(name, kind=None, add=None, **changes):
        model = make_model(name, **changes)
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE.get(name, name))
        convert(writer, name, model, kind)
        if add is not None:
            add(writer)
        finish(writer)
        return model, path

    return write


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_read_as_transformers_stores_them(name, tmp_path, written, logits_of):
    model, path = written(name)
    source = open_source(path)
    model.save_pretrained(tmp_path / "model")
    stored = open_source(tmp_path / "model")
    pooler = {n for n in stored.tensors if n.startswith("pooler")}
    # transformers 5 ties every T5, and keeps whether outputs are scaled
    more, skipped = ({"lm_head.weight"}, {"tie_word_embeddings"}) if "gated" in name else ([], [])
    assert source.tensors.keys() == (stored.tensors.keys() - pooler).union(more)
    state = model.state_dict()
    for key, tensor in source.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[key]), key
    assert source.config["model_type"] == stored.config["model_type"]
    for key in source.config.keys() & stored.config.keys() - set(skipped):
        if None not in (source.config[key], stored.config[key]):
            assert source.config[key] == stored.config[key], key
    assert torch.equal(logits_of(source), logits_of(model))
    assert source.tokenizer is None
    assert source.folder == tmp_path


# of weights up to 1 in a block: half a step, and the rounding of scale and minimum
ROUNDING = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 225, "Q5_0": 1 / 15, "Q5_1": 1 / 30}
ROUNDING |= {"Q4_0": 1 / 7, "Q4_1": 1 / 14}


@pytest.mark.parametrize("kind", ROUNDING)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized_weights_are_those_that_were_written(name, kind, written):
    model, path = written(name, Type[kind])
    state, tensors = model.state_dict(), open_source(path).tensors
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    for key, tensor in tensors.items():
        true = state[key]
        assert tensor.dtype == (dtype if true.ndim == 2 else torch.float32)
        assert tensor.shape == true.shape
        bound = ROUNDING[kind] * true.abs().max() if true.ndim == 2 else 0
        assert (tensor.float() - true).abs().max() <= bound, key


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2"])
@pytest.mark.parametrize(
    ("kind", "scheme", "error"),
    [("Q8_0", "int8", 2**-7), ("Q4_0", "int4", 2**-9), ("Q4_1", "int4_asym", 0.1)],
)
def test_load_keeps_the_bits_of_a_file(name, kind, scheme, error, written, tmp_path):
    """Q4_0 is int4 but for the scales, which bf16 rounds; minima are not zero points."""
    _, path = written(name, Type[kind])
    model, exact = load(path), load(path, dtype=torch.float32)
    assert (model.quantization.scheme, model.quantization.skip) == (scheme, [])
    assert not any(type(m) in (nn.Linear, nn.Embedding) for m in model.modules())
    assert exact.quantization is None
    restored = dequantize_(model).state_dict()
    for key, true in exact.state_dict().items():
        assert (restored[key] - true).norm() <= error * true.norm(), key


def test_load_takes_a_scheme_for_each_tensor(written):
    """Mixtures of llama.cpp keep some tensors in more bits, and others in floating point."""

    def kind_of(name):
        return {"attn_q": Type.Q8_0, "attn_k": Type.Q8_0, "attn_v": Type.Q8_0}.get(
            name.split(".")[-1], Type.F16 if name == "output" else Type.Q4_0
        )

    _, path = written("llama", kind_of)
    loaded = load(path)
    assert loaded.quantization.scheme == "int4"
    assert loaded.quantization.skip == ["head"]
    assert set(loaded.quantization.layers.values()) == {"int8"}
    assert all(name.endswith("attention.qkv") for name in loaded.quantization.layers)
    loaded.save(path.parent / "saved")
    again = load(path.parent / "saved")
    ids = torch.arange(5)[None]
    assert torch.equal(again(ids), loaded(ids))


def scales_and_minima(raw):
    """ggml's get_scale_min_k4, of 12 bytes."""
    pairs = [(raw[j] & 63, raw[j + 4] & 63) for j in range(4)]
    for j in range(4, 8):
        scale = raw[j + 4] & 15 | raw[j - 4] >> 6 << 4
        pairs.append((scale, raw[j + 4] >> 4 | raw[j] >> 6 << 4))
    return pairs


def decode_k4(raw, bits):
    """Q4_K and Q5_K as ggml-quants.c decodes a block of 256."""
    d, least = np.frombuffer(raw[:4], "<f2").astype(float)
    high, low = (raw[16:48], raw[48:]) if bits == 5 else (bytes(32), raw[16:])
    values = []
    for j, (scale, minimum) in enumerate(scales_and_minima(raw[4:16])):
        for i in range(32):
            code = low[j // 2 * 32 + i] >> 4 * (j % 2) & 15 | (high[i] >> j & 1) << 4
            values.append(d * scale * code - least * minimum)
    return values


def decode_q6(raw):
    low, high, scales = raw[:128], raw[128:192], np.frombuffer(raw[192:208], "i1")
    d = float(np.frombuffer(raw[208:], "<f2")[0])
    values = []
    for k in range(256):
        half, quarter, i = k // 128, k % 128 // 32, k % 32
        nibble = low[half * 64 + quarter % 2 * 32 + i] >> 4 * (quarter // 2) & 15
        code = nibble | (high[half * 32 + i] >> 2 * quarter & 3) << 4
        values.append(d * scales[k // 16] * (code - 32))
    return values


K_QUANTS = {
    "Q4_K": (144, lambda raw: decode_k4(raw, 4), (0, 2)),
    "Q5_K": (176, lambda raw: decode_k4(raw, 5), (0, 2)),
    "Q6_K": (210, decode_q6, (208,)),
}


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_decoded_as_ggml_does(kind, bare_llama):
    size, decode, halves = K_QUANTS[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64, 2, size), dtype=np.uint8)
    for at in halves:
        scale = rng.uniform(-0.1, 0.1, (64, 2, 1)).astype("<f2")
        blocks[:, :, at : at + 2] = scale.view(np.uint8)
    path = bare_llama({"output.weight": (blocks.reshape(64, -1), Type[kind])})
    got = open_source(path).tensors["lm_head.weight"]
    true = [[value for block in row for value in decode(block.tobytes())] for row in blocks]
    torch.testing.assert_close(got.double(), torch.tensor(true).double(), rtol=1e-6, atol=1e-6)


def test_numbers_of_the_config_are_not_those_of_fp32(bare_llama):
    config = open_source(bare_llama()).config
    assert config["rms_norm_eps"] == 1e-5
    assert (config["num_key_value_heads"], config["head_dim"]) == (8, 64)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (3, True)
    assert config["rope_scaling"] is None


def test_linear_and_yarn_scaling(bare_llama):
    def add(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    config = open_source(bare_llama(add=add)).config
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert config["rope_scaling"] == yarn

    def linear(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    config = open_source(bare_llama(add=linear)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}

    def longrope(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    with pytest.raises(ValueError, match="none, linear or yarn, got 'longrope'"):
        open_source(bare_llama(add=longrope))


def test_llama3s_scaling_is_found_in_its_frequencies(bare_llama):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        max_position_embeddings=1 << 16,
        rope_parameters=scaling | {"rope_theta": 10000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    divisors = (plain / scaled).float().numpy()
    path = bare_llama({"rope_freqs.weight": (divisors, Type.F32)})
    source = open_source(path)
    assert source.config["rope_scaling"] == scaling
    assert source.tensors.keys() == {"model.embed_tokens.weight"}
    divisors[10] *= 1.1
    path = bare_llama({"rope_freqs.weight": (divisors, Type.F32)})
    with pytest.raises(ValueError, match="rope_freqs of Llama 3"):
        open_source(path)
    path = bare_llama({"rope_freqs.weight": (divisors[:5], Type.F32)})
    with pytest.raises(ValueError, match="32 rope_freqs, got 5"):
        open_source(path)


def test_opening_reads_no_tensor_and_writing_changes_no_file(tmp_path, memory_grows, bare_llama):
    small = bare_llama().read_bytes()
    rows = 1 << 19
    raw = bytearray(small)
    # the embedding is the last part of the file: 3 rows become 1 GiB that takes no disk
    at = raw.index(struct.pack("<2Q", 512, 3))
    raw[at + 8 : at + 16] = struct.pack("<Q", rows)
    path = tmp_path / "large.gguf"
    path.write_bytes(raw)
    with path.open("ab") as file:
        file.truncate(len(raw) - 3 * 2048 + rows * 2048)

    def act():
        return open_source(path).tensors["model.embed_tokens.weight"]

    assert memory_grows(act) < 64 << 20
    weight = act()
    assert (weight[2, 0], weight[3, 0], weight.shape[0]) == (1, 0, rows)
    weight[2, 0] = 5
    assert act()[2, 0] == 1


def test_gguf_is_an_extra_for_quantized_tensors_alone(monkeypatch, bare_llama):
    plain = bare_llama()
    ones = quants.quantize(np.ones((3, 512), np.float32), Type.Q8_0)
    quantized = bare_llama({"output.weight": (ones, Type.Q8_0)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_source(plain).tensors["model.embed_tokens.weight"].sum() == 3 * 512
    with pytest.raises(ImportError, match=r'pip install "llmos_fast\[gguf\]"'):
        open_source(quantized)
