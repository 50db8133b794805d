"""Folders that are replaced as a whole, and the two kinds of files in them.

A reader finds the old content or the new one, never a mixture, wherever the writer was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``target`` when the block ends well.

    Everything is on the disk before anything is renamed. A block that fails leaves ``target`` as it
    was and nothing beside it.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            _flush_to_disk(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Folders cannot be exchanged in one portable call: between the two renames the old content
    # has another name, under which ``current_folder`` finds it.
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    partial.rename(target)
    _flush_to_disk(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def current_folder(target: Path) -> Path:
    """``target``, or its previous content where a writer was killed while it changed names."""
    previous = _previous(target)
    return previous if previous.exists() and not target.exists() else target


def _previous(target: Path) -> Path:
    return target.with_name(target.name + ".previous")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError where the disk refuses.

    What is one tensor under several names (tied weights) is written once; the file's metadata
    tells, of each other name, whose tensor it has, as ``safetensors.torch.save_model`` does.
    """
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    contiguous = {}
    for name, tensor in tensors.items():
        where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        same = first.setdefault(where, name) if tensor.numel() else name
        if same == name:
            contiguous[name] = tensor.detach().contiguous()
        else:
            aliases[name] = same
    try:
        save_file(contiguous, path, {"format": "pt", **aliases})  # transformers asks for the first
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ValueError where it is missing or not whole."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            aliases = file.metadata() or {}
        return tensors | {n: tensors[same] for n, same in aliases.items() if same in tensors}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError where the file is missing or anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
