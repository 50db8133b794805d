import hashlib
import lzma
import sys
from types import ModuleType

import pytest

from llmos_fast.data import open_corpus
from llmos_fast.data.corpus import WIKITEXT2


def test_shipped_wikitext2_is_the_original():
    content = lzma.decompress((WIKITEXT2 / "valid.txt.xz").read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    assert digest in (WIKITEXT2 / "LICENSE").read_text()


def test_shipped_wikitext2_lines():
    corpus = open_corpus("wikitext-2")
    lines = list(corpus.lines("valid"))
    assert len(lines) == 3760
    assert sum(len(line.split()) + 1 for line in lines) == 217646


def test_file_is_split_in_order(tmp_path):
    lines = [f"line {i}" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    corpus = open_corpus(str(tmp_path / "a.txt"))
    parts = [list(corpus.lines(split)) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [36, 2, 2]
    assert [line for part in parts for line in part] == lines


def test_folder_with_one_file_per_split(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(f"{split} text\n")
    corpus = open_corpus(str(tmp_path))
    assert [list(corpus.lines(s)) for s in ("train", "valid")] == [["train text"], ["valid text"]]
    with pytest.raises(ValueError, match="split must be one of"):
        corpus.lines("dev")


def test_folder_of_texts(tmp_path):
    (tmp_path / "b.txt").write_text("b\n" * 10)
    (tmp_path / "a.txt").write_text("a\n" * 10)
    (tmp_path / "notes.md").write_text("not read")
    corpus = open_corpus(str(tmp_path))
    assert "".join(corpus.lines("train")) == "a" * 10 + "b" * 8


def test_missing_and_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text file"):
        open_corpus(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"must hold \.txt files"):
        open_corpus(str(tmp_path))


def test_damaged_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        list(open_corpus(str(tmp_path / "a.txt")).lines("train"))
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"text\n" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"not a whole \.xz file"):
        list(open_corpus(str(tmp_path / "b.txt.xz")).lines("train"))


def test_online_corpus_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install llmos-fast\[datasets\]"):
        open_corpus("wikitext-103")


def test_online_corpus(monkeypatch):
    package = ModuleType("datasets")
    asked = []

    def load_dataset(name, configuration, streaming):
        asked.append((name, configuration, streaming))
        return {
            "train": [{"text": "a b\n"}, {"text": ""}, {"text": "c\nd"}],
            "validation": [{"text": "e"}],
        }

    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    corpus = open_corpus("hf:owner/name")
    assert asked == [("owner/name", None, True)]
    assert list(corpus.lines("train")) == ["a b", "", "c", "d"]
    assert list(corpus.lines("valid")) == ["e"]
    with pytest.raises(ValueError, match="split must be one of train, validation"):
        list(corpus.lines("test"))
