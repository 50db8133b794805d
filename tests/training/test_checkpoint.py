import json

import pytest
import torch

import llmos_fast
from llmos_fast.data import train_byte_pair
from llmos_fast.models import TransformerModel
from llmos_fast.training import Checkpoint, Quantization, quantize_linears

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


def test_quantized(checkpoint, tmp_path, monkeypatch):
    """The skeleton is quantized before the weights are read."""
    calls = []

    def quantize_(model, scheme, group_size):
        calls.append((scheme, group_size))
        model.decoder.weight.data = model.decoder.weight.data.half()

    monkeypatch.setattr(llmos_fast, "quantize_", quantize_, raising=False)
    quantization = Quantization("int8", 32)
    quantize_linears(checkpoint.model, quantization)
    Checkpoint(checkpoint.model, checkpoint.tokenizer, "wikitext-2", 5, quantization).save(
        tmp_path / "c"
    )
    loaded = Checkpoint.load(tmp_path / "c")
    assert calls == [("int8", 32)] * 2
    assert loaded.quantization == quantization
    assert loaded.model.decoder.weight.dtype == torch.float16
