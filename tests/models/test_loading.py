"""Checkpoints: saved and loaded again, quantized on the way, kept in the file, refused, real."""

import contextlib
import copy
import ctypes
import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmos_fast.checkpoints import storage
from llmos_fast.models import build, load, loading, pretrained
from llmos_fast.nn import dequantize_, quantize_
from llmos_fast.testing import assert_close_to_truth

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NAMES = ["gpt2", "llama", "llama tied", "llama odd", "qwen3", "bert", "t5", "t5 gated"]
SCHEMES = ["int8", "int4", "int4_asym", "nf4"]


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


# --- saved and loaded again


@pytest.mark.parametrize("shard", [5 * 10**9, 20_000])
@pytest.mark.parametrize("name", NAMES)
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


def test_a_dtype_that_is_no_float_is_refused(saved, folder, refused):
    saved("llama")
    refused(lambda: load(folder, dtype=torch.int8), "dtype must be")


def test_what_build_made_is_saved_and_loaded(tmp_path, config_of):
    model = build(config_of("llama"))
    model.save(tmp_path / "built")
    assert_equal_states(load(tmp_path / "built"), model)


def test_older_names_and_unused_heads_of_bert_are_read(
    tmp_path, saved, folder, change_config, change_tensors
):
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
@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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
    with contextlib.suppress(AttributeError):  # glibc's: what is free and kept would count, too
        ctypes.CDLL(None).malloc_trim(0)
    line = next(s for s in status.read_text().splitlines() if s.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_quantizing_holds_one_weight_at_a_time(tmp_path, monkeypatch, config_of):
    sizes = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 2048, "num_hidden_layers": 6}
    model = build(config_of("llama") | sizes)
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
