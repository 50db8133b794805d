"""Hugging Face's folders: config.json and safetensors, whole or in shards.

    model.safetensors              the tensors, or
    model.safetensors.index.json   {"weight_map": {name of a tensor: name of its shard}}

safetensors itself refuses headers that are cut off, larger than the file or 100 MB, not UTF-8 or
JSON, and tensors that overlap, leave gaps, end elsewhere than the file, or whose shape overflows or
disagrees with their bytes. It takes the last of two tensors of one name: the first is sought here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmos_fast.checkpoints.reading import error_in

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Readers = dict[str, Callable[[], Tensor]]

# one name, without folders: what "../x" names is not part of the checkpoint
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)


def read_folder(folder: Path) -> tuple[dict[str, Any], Readers]:
    """The config and the tensors of a folder. Raises ValueError where it is not whole."""
    config = read_config(folder)
    if (folder / WHOLE).is_file():
        return config, read_safetensors(folder / WHOLE)
    return config, _read_shards(folder)


def read_one_file(path: Path) -> tuple[dict[str, Any], Readers]:
    """The tensors of one safetensors file, and the config.json beside it."""
    return read_config(path.parent), read_safetensors(path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with a model_type."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"open_source: folder must hold config.json, got {str(folder)!r}")
    config = _parse(path.read_bytes(), path)
    if not isinstance(config.get("model_type"), str):
        raise error_in(path, "have a model_type", repr(config.get("model_type")))
    return config


def _read_shards(folder: Path) -> Readers:
    path = folder / INDEX
    shard_of = _parse(path.read_bytes(), path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise error_in(path, "have a weight_map from tensors to files", type(shard_of).__name__)
    expected: dict[str, set[str]] = {}
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise error_in(path, "name .safetensors files of its folder", repr(shard))
        expected.setdefault(shard, set()).add(name)
    readers: Readers = {}
    for shard, names in expected.items():
        if not (folder / shard).is_file():
            raise error_in(path, "name files that exist", repr(shard))
        found = read_safetensors(folder / shard)
        if different := sorted(names ^ found.keys()):
            rule = f"list exactly the tensors of {shard}"
            raise error_in(path, rule, f"{len(different)} that differ, {different[0]!r} first")
        readers |= found
    return readers


def read_safetensors(path: Path) -> Readers:
    """The tensors of one file, memory-mapped."""
    try:
        file: Any = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise error_in(path, "be a whole safetensors file", error) from error
    with path.open("rb") as raw:
        _parse(raw.read(int.from_bytes(raw.read(8), "little")), path)
    return {name: partial(_read, file, name, path) for name in file.keys()}  # noqa: SIM118


def _read(file: Any, name: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:  # a type that torch has not got
        raise error_in(path, f"hold {name!r} in a type of torch", error) from error
    return tensor


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise error_in(path, "hold JSON with every name once", error) from error
    if not isinstance(content, dict):
        raise error_in(path, "hold a JSON object", type(content).__name__)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands twice")
    return content
