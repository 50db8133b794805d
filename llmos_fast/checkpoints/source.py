"""A checkpoint in whatever format, read as what Hugging Face would have stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmos_fast.checkpoints.gguf import read_gguf
from llmos_fast.checkpoints.hub import download
from llmos_fast.checkpoints.llama2c import read_llama2c
from llmos_fast.checkpoints.safetensors_folder import INDEX, WHOLE, read_folder, read_one_file

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SUFFIXES = (".gguf", ".safetensors", *_PICKLED)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name; each is read when it is asked for, and afresh every time."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    config:    as Hugging Face's config.json
    tensors:   Hugging Face's names and layouts; a tensor is touched only when it is asked for
    folder:    where tokenizer files may lie
    schemes:   for the tensors that the format has quantized, the closest scheme of ours
    tokenizer: builds the tokenizer that the file itself carries, a ``tokenizers.Tokenizer``, and a
               dict of begin_id, end_ids, unknown_id, pad_id, adds_begin and chat_template
    """

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    folder: Path | None = None
    schemes: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Callable[[], tuple[Any, dict[str, Any]]] | None = None


def open_source(path: str | Path) -> Source:
    """Open a checkpoint; the format is chosen by what is there.

    path: a folder with config.json and model.safetensors (or the index of its shards), a
        .safetensors file beside a config.json, a .gguf file, llama2.c's .bin file, or "owner/name",
        a model of the Hugging Face hub

    Raises ValueError for a file that is damaged, and for pickle files, which can run code;
    FileNotFoundError where there is none.
    """
    where = Path(path)
    if where.is_dir():
        return _open_folder(where)
    if where.is_file():
        return _open_file(where)
    if _HUB_NAME.fullmatch(str(path)) and where.suffix not in _SUFFIXES:
        return _open_folder(download(str(path)))
    rule = 'be a folder, a file or a model of the hub, "owner/name"'
    raise FileNotFoundError(f"open_source: path must {rule}, got {str(path)!r}")


def _open_folder(folder: Path) -> Source:
    if (folder / WHOLE).is_file() or (folder / INDEX).is_file():
        config, readers = read_folder(folder)
        return Source(config, LazyTensors(readers), folder)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise _pickled(folder / pickled[0], folder)
    raise ValueError(f"open_source: folder must hold {WHOLE} or {INDEX}, got {str(folder)!r}")


def _open_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        config, readers = read_one_file(path)
        return Source(config, LazyTensors(readers), path.parent)
    if path.suffix == ".gguf":
        config, readers, schemes, tokenizer = read_gguf(path)
        return Source(config, LazyTensors(readers), path.parent, schemes, tokenizer)
    if path.suffix in _PICKLED:
        if path.suffix != ".bin" or _is_pickle(path):
            raise _pickled(path, path.parent)
        config, readers = read_llama2c(path)
        return Source(config, LazyTensors(readers), path.parent)
    raise ValueError(
        f"open_source: file must end in .safetensors, .gguf or .bin, got {path.name!r}"
    )


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4)
    # llama2.c's files begin with a small int32: the third byte of width 640, 80 02 00 00, is 0
    return head == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] < b"\x06" and any(head[2:3]))


def _pickled(path: Path, folder: Path) -> ValueError:
    return ValueError(
        f"open_source: file must not be a pickle, which can run code, got {path.name!r} (convert "
        f"{str(folder)!r} once with transformers: AutoModel.from_pretrained(...) and "
        "save_pretrained(path, safe_serialization=True))"
    )
