import os
import resource
from contextlib import contextmanager

import pytest
import torch

from llmos_fast.checkpoints.storage import (
    current_folder,
    read_json,
    read_tensors,
    replace_folder,
    write_tensors,
)


def write(target, content):
    with replace_folder(target) as partial:
        (partial / "a").write_text(content)


def test_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "new" / "t"
    write(target, "one")
    (target / "stray").touch()
    write(target, "two")
    assert [p.name for p in target.iterdir()] == ["a"]
    assert (target / "a").read_text() == "two"
    assert os.listdir(target.parent) == ["t"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=["disk", "ctrl-c"])
def test_failure_keeps_the_old_folder(tmp_path, error):
    write(tmp_path / "t", "one")

    def fail():
        with replace_folder(tmp_path / "t") as partial:
            (partial / "a").write_text("two")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "t" / "a").read_text() == "one"
    assert os.listdir(tmp_path) == ["t"]


class Killed(BaseException):
    """Stands for the end of the process: nothing after it may run."""


@pytest.mark.parametrize("fatal_rename", [1, 2], ids=["before", "between"])
def test_killed_while_renaming(tmp_path, monkeypatch, fatal_rename):
    """Whatever the moment, a reader finds whole content and the next writer succeeds."""
    target, rename, calls = tmp_path / "t", type(tmp_path).rename, []
    write(target, "one")

    def kill(self, new):
        calls.append(new)
        if len(calls) == fatal_rename:
            raise Killed
        return rename(self, new)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", kill)
        with pytest.raises(Killed):
            write(target, "two")
    assert (current_folder(target) / "a").read_text() == "one"
    write(target, "three")
    assert (current_folder(target) / "a").read_text() == "three"
    assert os.listdir(tmp_path) == ["t"]


def test_leftovers_of_a_killed_writer_do_not_matter(tmp_path):
    (tmp_path / "t.partial").mkdir()
    (tmp_path / "t.partial" / "half").touch()
    write(tmp_path / "t", "one")
    assert os.listdir(tmp_path / "t") == ["a"]


@contextmanager
def file_size_limit():
    """A real write error: no file may grow beyond 4 KiB, not even a log that pytest writes to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_refused_write_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"t\.safetensors"), file_size_limit():
        write_tensors(tmp_path / "t.safetensors", {"w": torch.zeros(5000)})


def test_tensors_round_trip(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(1.5)}
    write_tensors(tmp_path / "t", tensors)
    read = read_tensors(tmp_path / "t")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"], ids=["empty", "cut", "list", "bytes"])
def test_read_json_refuses(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
