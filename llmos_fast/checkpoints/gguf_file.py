"""The bytes of llama.cpp's GGUF files, versions 2 and 3.

header    "GGUF", u32 version, u64 tensors, u64 pairs
pair      string key, u32 type, value
tensor    string name, u32 dimensions, each as u64 (the last axis first), u32 type, u64 offset
data      from the next multiple of general.alignment on; so does every tensor
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmos_fast.checkpoints.reading import error_in

_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_TYPES = {  # of tensors: name, weights of a block, bytes of a block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Python objects of a pair or a tensor are larger than its bytes: files with more are no models
_MOST = 1 << 16


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: Hugging Face's order of axes, and its bytes."""

    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


class _Cursor:
    """Reads a header front to back; no count is believed that the rest of the file cannot hold."""

    def __init__(self, path: Path):
        self.path = path
        if path.stat().st_size < 24:
            raise self.error("begin with a header of 24 bytes", f"{path.stat().st_size} bytes")
        # private pages: who writes into a tensor does not write into the file
        self.file = np.asarray(np.memmap(path, np.uint8, "c"))
        self.bytes = self.file.data
        self.at = 0

    def error(self, rule: str, got: object) -> ValueError:
        return error_in(self.path, rule, got)

    def take(self, size: int) -> memoryview:
        if size > len(self.bytes) - self.at:
            raise self.error("be whole", f"{size} bytes announced at {self.at}, beyond its end")
        self.at += size
        return self.bytes[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error("hold UTF-8", error) from error

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise self.error("hold values of types 0 to 12", kind)
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        if inner not in _NUMBERS:
            raise self.error("hold arrays of numbers or strings", f"type {inner}")
        dtype = np.dtype(_NUMBERS[inner]).newbyteorder("<")
        return np.frombuffer(self.take(dtype.itemsize * count), dtype)

    def unique_string(self, known: dict[str, Any], most: int) -> str:
        name = self.string()
        if name in known or len(name) > most:
            raise self.error(f"have names once, of at most {most} letters", repr(name[:most]))
        return name


@dataclass(frozen=True)
class GGUF:
    """An opened file: what it says of itself, and its tensors, all of them inside of the file."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Stored]
    bytes: Tensor

    def error(self, rule: str, got: object) -> ValueError:
        """One sentence for what the file must do."""
        return error_in(self.path, rule, got)

    def has(self, tensor: str) -> bool:
        """Whether there is such a tensor."""
        return tensor in self.tensors

    def read(self, name: str) -> Tensor:
        """A tensor: fp32, fp16 and bf16 in place, others dequantized to fp32."""
        stored = self.tensors[name]
        raw = self.bytes[stored.start : stored.start + stored.nbytes]
        if stored.kind in _PLAIN:
            return raw.view(_PLAIN[stored.kind]).view(stored.shape)
        quants = blocks_module(self.path)
        rows = raw.view(*stored.shape[:-1], -1).numpy()
        with np.errstate(all="ignore"):  # scales of a damaged file may be inf
            values = quants.dequantize(rows, quants.GGMLQuantizationType[stored.kind])
        return torch.from_numpy(values).view(stored.shape)


def blocks_module(path: Path) -> Any:
    """gguf.quants, which knows the blocks of quantized tensors."""
    try:
        from gguf import quants
    except ImportError as error:
        raise ImportError(
            f'open_source: {path} has quantized tensors: pip install "llmos_fast[gguf]"'
        ) from error
    return quants


def open_gguf(path: Path) -> GGUF:
    """Read the header of a file. Raises ValueError where it is damaged."""
    file = _Cursor(path)
    values, tensors = _header(file)
    # what was merged again says 0
    if type(parts := values.get("split.count", 0)) is not int or parts not in (0, 1):
        raise file.error("be a whole model (llama-gguf-split --merge)", f"one of {parts} parts")
    if any(tensor.kind not in _PLAIN for tensor in tensors.values()):
        blocks_module(path)
    return GGUF(path, values, tensors, torch.from_numpy(file.file))


def _header(file: _Cursor) -> tuple[dict[str, Any], dict[str, Stored]]:
    if bytes(file.take(4)) != b"GGUF":
        raise file.error("begin with GGUF", bytes(file.bytes[:4]))
    if (version := file.number("I")) not in (2, 3):
        raise file.error("be little-endian and have version 2 or 3", version)
    tensors, pairs = file.number("Q"), file.number("Q")
    if max(tensors, pairs) > _MOST:
        raise file.error(f"hold at most {_MOST} tensors and pairs", f"{tensors} and {pairs}")
    values: dict[str, Any] = {}
    for _ in range(pairs):
        key = file.unique_string(values, 1 << 16)
        values[key] = file.value()
    infos: dict[str, Stored] = {}
    for _ in range(tensors):
        name = file.unique_string(infos, 64)
        infos[name] = _tensor_info(file)

    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment % 8 or not 8 <= alignment <= 1 << 20:
        raise file.error("have a multiple of 8 as alignment", alignment)
    begin = -(-file.at // alignment) * alignment
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        if info.start % alignment or info.start < end:
            rule = f"have tensors at multiples of {alignment}, one after another"
            raise file.error(rule, f"{name!r} at {info.start}")
        end = info.start + info.nbytes
        if begin + end > len(file.bytes):
            raise file.error("be whole", f"{name!r} up to byte {begin + end}, beyond its end")
        infos[name] = replace(info, start=begin + info.start)
    return values, infos


def _tensor_info(file: _Cursor) -> Stored:
    dimensions = file.number("I")
    if not 1 <= dimensions <= 4:
        raise file.error("have tensors of 1 to 4 dimensions", dimensions)
    shape = tuple(file.number("Q") for _ in range(dimensions))[::-1]
    code, offset = file.number("I"), file.number("Q")
    if code not in _TYPES:
        known = ", ".join(name for name, _, _ in _TYPES.values())
        raise file.error(f"have tensors of types {known}", f"number {code}")
    kind, block, nbytes = _TYPES[code]
    if 0 in shape or shape[-1] % block:
        raise file.error(f"have {kind} tensors in rows of whole blocks of {block}", shape)
    return Stored(shape, kind, offset, math.prod(shape) // block * nbytes)
