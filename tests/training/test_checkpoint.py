import json
from dataclasses import replace

import pytest
import torch

from llmos_fast.data import train_byte_pair
from llmos_fast.models import Quantization, TransformerModel
from llmos_fast.nn import QuantLinear, quantize_
from llmos_fast.training import Checkpoint

TOKENS = torch.tensor([[2, 3, 4, 5]])


@pytest.fixture
def checkpoint(make_trainer, make_checkpoint):
    return make_checkpoint(make_trainer().model.eval())


def test_round_trip(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    assert torch.equal(loaded.model(TOKENS), checkpoint.model(TOKENS))
    assert loaded.tokenizer.words == checkpoint.tokenizer.words
    assert (loaded.text, loaded.context, loaded.quantization) == ("wikitext-2", 5, None)


def test_byte_pairs(tmp_path):
    tokenizer = train_byte_pair(["the cat saw the dog"], 260)
    model = TransformerModel(len(tokenizer), 8, 2, 8, 1)
    Checkpoint(model, tokenizer, "text.txt", 7).save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    assert loaded.tokenizer.encode("the cat") == tokenizer.encode("the cat")


def test_nothing_is_pickled(checkpoint, tmp_path):
    checkpoint.save(tmp_path / "c")
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"config.json", "vocabulary.json", "model.safetensors"}


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        Checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_damaged_files(checkpoint, tmp_path, name, damage):
    checkpoint.save(tmp_path / "c")
    path = tmp_path / "c" / name
    content = path.read_bytes()
    path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    if damage == "missing":
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=name.split(".")[0]):
        Checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 99},
        {"model": {"ntoken": 8}},
        {"model": None},
        {"tokenizer": "letters"},
        {"model": {"ntoken": 8, "ninp": 16, "nhead": 2, "nhid": 16, "nlayers": 2, "dropout": 0.2}},
    ],
    ids=["format", "version", "arguments", "none", "tokenizer", "other sizes"],
)
def test_wrong_config(checkpoint, tmp_path, change):
    checkpoint.save(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"Checkpoint\.load"):
        Checkpoint.load(tmp_path / "c")


def quantized(checkpoint, **arguments):
    report = quantize_(checkpoint.model, "int4", 32, **arguments)
    others = {layer.name: layer.scheme for layer in report.layers if layer.scheme != "int4"}
    return replace(checkpoint, quantization=Quantization("int4", 32, others))


@pytest.mark.parametrize("mixed", [False, True], ids=["one scheme", "mixed"])
def test_quantized(checkpoint, tmp_path, mixed):
    tokens = torch.arange(8)[None]
    arguments = {"calibration": [tokens], "bits": 12.0} if mixed else {}
    saved = quantized(checkpoint, **arguments)
    saved.save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    assert loaded.quantization == saved.quantization
    assert bool(loaded.quantization.layers) == mixed
    schemes = {m.scheme for m in loaded.model.modules() if isinstance(m, QuantLinear)}
    assert schemes == ({"int4", "int8"} if mixed else {"int4"})
    assert torch.equal(loaded.model(tokens), saved.model.eval()(tokens))


def test_quantized_before_layers_had_schemes_of_their_own(checkpoint, tmp_path):
    quantized(checkpoint).save(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization"]["layers"]
    path.write_text(json.dumps(config))
    assert Checkpoint.load(tmp_path / "c").quantization == Quantization("int4", 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": {"decoder": "int3"}}, "scheme must be one of"),
        ({"layers": {"nobody": "int8"}}, "schemes must name layers, got nobody"),
        ({"layers": {"decoder": "int8"}}, "must hold int8, got int4"),
        ({"layers": ["decoder"]}, "layers must be a dict"),
        ({"layers": {"decoder": 8}}, "scheme must be one of"),
        ({"layers": None}, "layers must be a dict"),
        ({"scheme": "nf4"}, "must hold nf4, got int4"),
        ({"group_size": 48}, "group_size must be 32, 64 or 128, got 48"),
        ({"group_size": "32"}, "group_size must be 32, 64 or 128, got '32'"),
        ({"bits": 4}, "damaged"),
    ],
    ids=str,
)
def test_damaged_quantization_is_refused(checkpoint, tmp_path, change, message):
    quantized(checkpoint).save(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    config["quantization"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(tmp_path / "c")
