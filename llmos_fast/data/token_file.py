"""Token streams: encoded in memory, or in a memory-mapped file for corpora larger than memory.

The file is a header of 24 bytes, then the ids: magic "LLMOSTOK", format version and dtype code as
uint32, count as uint64, all little-endian.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"LLMOSTOK"
_VERSION = 1
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<u2"), 2: np.dtype("<i4")}


class TextDecoder(Protocol):
    """Text of ids that come one by one."""

    def push(self, index: int) -> str:
        """Text that became final."""

    def flush(self) -> str:
        """What is left at the end."""


class Tokenizer(Protocol):
    """What turns text into ids and back: our own or a ``PretrainedTokenizer``."""

    @property
    def kind(self) -> str:
        """Name of the kind: "words", "bpe" or "pretrained"."""

    @property
    def end_id(self) -> int | None:
        """Id of the end of a line or text; None where there is none."""

    @property
    def unknown_id(self) -> int | None:
        """Id of ``<unk>``; None where every text has ids of its own."""

    def __len__(self) -> int: ...

    def encode(self, text: str, unknown: str = "map") -> list[int]:
        """Ids of ``text``; ``unknown`` says what happens to words without an id."""

    def encode_line(self, line: str) -> list[int]:
        """Ids of one line with its end marker."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``."""

    def stream(self) -> TextDecoder:
        """Decoder of ids that come one by one."""

    def save(self, path: Path | str) -> None:
        """Write the tokenizer: to one JSON file, or a pretrained one's files to a folder."""


def encode_lines(tokenizer: Tokenizer, lines: Iterable[str]) -> Tensor:
    """All ``lines`` as one stream in memory: int32 [count]."""
    ids = array("i")
    for line in lines:
        ids.extend(tokenizer.encode_line(line))
    return torch.tensor(ids, dtype=torch.int32)


def write_token_file(path: Path | str, tokenizer: Tokenizer, lines: Iterable[str]) -> int:
    """Encode ``lines`` one by one into a token file and return the number of tokens.

    The file appears under its name only when it is whole. Ids are stored in 2 bytes where the
    vocabulary allows it, otherwise in 4.
    """
    path = Path(path)
    code = 1 if len(tokenizer) <= 1 << 16 else 2
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with partial.open("wb") as file:
            file.write(bytes(_HEADER.size))
            for line in lines:
                ids = tokenizer.encode_line(line)
                file.write(np.asarray(ids, _DTYPES[code]).tobytes())
                count += len(ids)
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, _VERSION, code, count))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def open_token_file(path: Path | str) -> Tensor:
    """Map a token file: uint16 or int32 [count], read from disk page by page when it is used.

    Writing to the tensor changes memory only, never the file. Raises ValueError where the file is
    not a whole token file.
    """
    path = Path(path)
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError(f"open_token_file: {path} is not a token file")
    _, version, code, count = _HEADER.unpack(header)
    if version != _VERSION or code not in _DTYPES:
        raise ValueError(
            f"open_token_file: {path} must have version {_VERSION} and a dtype code in "
            f"{sorted(_DTYPES)}, got {version} and {code}"
        )
    expected = _HEADER.size + count * _DTYPES[code].itemsize
    if path.stat().st_size != expected:
        raise ValueError(
            f"open_token_file: {path} must have {expected} bytes for {count} tokens, "
            f"got {path.stat().st_size}"
        )
    if count == 0:
        return torch.empty(0, dtype=torch.int32)
    # Copy-on-write: torch warns about tensors over read-only memory.
    mapped = np.memmap(path, _DTYPES[code], mode="c", offset=_HEADER.size, shape=(count,))
    return torch.from_numpy(mapped)
