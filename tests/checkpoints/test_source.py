"""What open_source takes for what, and what it refuses."""

import sys
import types
import zipfile

import pytest
import torch

from llmos_fast.checkpoints.source import LazyTensors, open_source


@pytest.fixture
def folder(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_and_its_file_are_the_same_source(folder):
    whole, file = open_source(folder), open_source(str(folder / "model.safetensors"))
    assert whole.config == file.config
    assert whole.config["model_type"] == "llama"
    assert whole.folder == file.folder == folder
    assert whole.tokenizer is None
    assert set(whole.tensors) == set(file.tensors)
    assert all(torch.equal(tensor, file.tensors[name]) for name, tensor in whole.tensors.items())


def test_names_are_known_without_reading():
    def refuse():
        raise AssertionError("read")

    tensors = LazyTensors({"a": refuse, "b": lambda: torch.ones(2)})
    assert list(tensors) == ["a", "b"]
    assert len(tensors) == 2
    assert "a" in tensors
    assert "c" not in tensors
    assert torch.equal(tensors["b"], torch.ones(2))
    with pytest.raises(KeyError):
        tensors["c"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_with_the_way_out(name, zipped, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    path = tmp_path / name
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    for refused in (tmp_path, path):
        with pytest.raises(ValueError, match=rf"{name}.*safe_serialization=True") as error:
            open_source(refused)
        assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"folder must hold model\.safetensors"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"file must end in"):
        open_source(tmp_path / "notes.txt")
    for missing in (tmp_path / "missing", "missing/model.gguf", "missing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="path must be a folder, a file or a model of"):
            open_source(missing)


def test_a_name_is_a_model_of_the_hub(folder, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert open_source("owner/name-1.5").folder == folder
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    assert asked == [("owner/name-1.5", patterns)]


def test_the_hub_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "llmos_fast\[hub\]"'):
        open_source("owner/name")
