import errno
import os

import pytest
import torch

from llmos_fast.data import (
    batchify,
    build_vocab,
    encode_lines,
    open_token_file,
    windows,
    write_token_file,
)

LINES = ["the cat saw the dog", "", "a dog ran", "the cat ran and ran"]


@pytest.fixture
def vocabulary():
    return build_vocab(LINES)


def test_equals_encoding_in_memory(tmp_path, vocabulary):
    count = write_token_file(tmp_path / "t", vocabulary, iter(LINES))
    mapped, in_memory = open_token_file(tmp_path / "t"), encode_lines(vocabulary, LINES)
    assert count == len(in_memory)
    assert mapped.dtype == torch.uint16
    assert torch.equal(mapped.int(), in_memory)
    for ours, theirs in zip(windows(mapped, 2, 3), windows(in_memory, 2, 3), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert batchify(mapped, 2).data_ptr() == mapped.data_ptr()


def test_large_vocabulary_takes_four_bytes(tmp_path):
    words = [f"w{i}" for i in range(1 << 16)]
    vocabulary = build_vocab(words)
    write_token_file(tmp_path / "t", vocabulary, words[-2:])
    mapped = open_token_file(tmp_path / "t")
    assert mapped.dtype == torch.int32
    assert mapped.tolist() == [65536, 1, 65537, 1]


def test_writing_to_the_tensor_leaves_the_file(tmp_path, vocabulary):
    write_token_file(tmp_path / "t", vocabulary, LINES)
    before = (tmp_path / "t").read_bytes()
    open_token_file(tmp_path / "t")[0] = 5
    assert (tmp_path / "t").read_bytes() == before


def test_empty(tmp_path, vocabulary):
    assert write_token_file(tmp_path / "t", vocabulary, []) == 0
    assert open_token_file(tmp_path / "t").numel() == 0


def test_every_truncation_is_refused(tmp_path, vocabulary):
    write_token_file(tmp_path / "t", vocabulary, LINES)
    content = (tmp_path / "t").read_bytes()
    for length in range(len(content)):
        (tmp_path / "t").write_bytes(content[:length])
        with pytest.raises(ValueError, match="open_token_file"):
            open_token_file(tmp_path / "t")


@pytest.mark.parametrize("offset", [0, 8, 12, 16], ids=["magic", "version", "dtype", "count"])
def test_damaged_header_is_refused(tmp_path, vocabulary, offset):
    write_token_file(tmp_path / "t", vocabulary, LINES)
    content = bytearray((tmp_path / "t").read_bytes())
    content[offset] ^= 0xFF
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match="open_token_file"):
        open_token_file(tmp_path / "t")


def test_failed_write_leaves_the_old_file(tmp_path, vocabulary, monkeypatch):
    write_token_file(tmp_path / "t", vocabulary, LINES)
    before = (tmp_path / "t").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_token_file(tmp_path / "t", vocabulary, LINES[:1])
    assert (tmp_path / "t").read_bytes() == before
    assert os.listdir(tmp_path) == ["t"]
