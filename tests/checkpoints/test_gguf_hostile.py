"""GGUF files whose header says what it must not: refused, at once and in one line."""

import struct

import numpy as np
import pytest

from llmos_fast.checkpoints.source import open_source

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
Type = gguf.GGMLQuantizationType


def header(tensors=0, pairs=0, rest=b"", magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, pairs) + rest


def string(text):
    return struct.pack("<Q", len(text)) + text


def pair(kind, value, key=b"key"):
    return string(key) + struct.pack("<I", kind) + value


def info(name=b"token_embd.weight", shape=(8,), kind=0, offset=0):
    numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return string(name) + numbers


HUGE = struct.pack("<Q", 2**62)
# what must be said of a header, and the header
HOSTILE = {
    "empty": ("header of 24", b""),
    "another magic": ("begin with GGUF", header(magic=b"GGML")),
    "version 1": ("version 2 or 3", header(version=1)),
    "big-endian": ("version 2 or 3", header(version=3 << 24)),
    "many tensors": ("at most 65536", header(tensors=2**63)),
    "many pairs": ("at most 65536", header(pairs=2**64 - 1)),
    "more pairs than bytes": ("be whole", header(pairs=1000)),
    "a long key": ("be whole", header(pairs=1, rest=HUGE)),
    "a long text": ("be whole", header(pairs=1, rest=pair(8, HUGE))),
    "a text beyond the end": (
        "be whole",
        header(pairs=1, rest=pair(8, struct.pack("<Q", 9) + b"short")),
    ),
    "not UTF-8": ("hold UTF-8", header(pairs=1, rest=pair(8, string(b"\xff\xfe")))),
    "an unknown type": ("types 0 to 12", header(pairs=1, rest=pair(13, bytes(8)))),
    "a key twice": ("names once", header(pairs=2, rest=2 * pair(4, bytes(4)))),
    "a long array": ("be whole", header(pairs=1, rest=pair(9, struct.pack("<I", 6) + HUGE))),
    "a long array of texts": (
        "be whole",
        header(pairs=1, rest=pair(9, struct.pack("<I", 8) + HUGE)),
    ),
    "arrays of arrays": (
        "arrays of numbers or strings",
        header(pairs=1, rest=pair(9, struct.pack("<IQ", 9, 1) * 5000)),
    ),
    "no dimensions": ("1 to 4 dim", header(tensors=1, rest=info(shape=()))),
    "5 dimensions": ("1 to 4 dim", header(tensors=1, rest=info(shape=(1,) * 5))),
    "2**32 - 1 dimensions": (
        "1 to 4 dim",
        header(tensors=1, rest=string(b"a") + b"\xff" * 4 + bytes(64)),
    ),
    "a dimension of 0": ("whole blocks of 1", header(tensors=1, rest=info(shape=(0, 8)))),
    "2**248 weights": ("be whole", header(tensors=1, rest=info(shape=(2**62,) * 4) + bytes(64))),
    "an unknown tensor type": ("of types F32", header(tensors=1, rest=info(kind=99) + bytes(64))),
    "half a block": (
        "whole blocks of 32",
        header(tensors=1, rest=info(shape=(33,), kind=8) + bytes(99)),
    ),
    "an offset between": ("multiples of 32", header(tensors=1, rest=info(offset=4) + bytes(99))),
    "an offset beyond": ("be whole", header(tensors=1, rest=info(offset=2**63) + bytes(99))),
    "an offset at the end": ("be whole", header(tensors=1, rest=info(offset=64) + bytes(99))),
    "overlap": (
        "one after another",
        header(tensors=2, rest=info(shape=(16,)) + info(b"b", offset=32) + bytes(999)),
    ),
    "a tensor twice": ("names once", header(tensors=2, rest=info() + info(offset=32) + bytes(999))),
    "a long name": ("at most 64", header(tensors=1, rest=info(b"a" * 65) + bytes(999))),
    "alignment 0": ("multiple of 8", header(pairs=1, rest=pair(4, bytes(4), b"general.alignment"))),
    "alignment 12": (
        "multiple of 8",
        header(pairs=1, rest=pair(4, b"\14\0\0\0", b"general.alignment")),
    ),
    "a text as alignment": (
        "multiple of 8",
        header(pairs=1, rest=pair(8, string(b"32"), b"general.alignment")),
    ),
    "a part of a file": ("whole model", header(pairs=1, rest=pair(2, b"\3\0", b"split.count"))),
    "no architecture": ("an architecture of", header(tensors=1, rest=info() + bytes(99))),
    "another architecture": (
        "an architecture of",
        header(pairs=1, rest=pair(8, string(b"rwkv"), b"general.architecture")),
    ),
    "a number as architecture": (
        "an architecture of",
        header(pairs=1, rest=pair(4, bytes(4), b"general.architecture")),
    ),
    "nothing but llama": (
        "integer embedding_length",
        header(pairs=1, rest=pair(8, string(b"llama"), b"general.architecture")),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_and_cost_nothing(name, tmp_path, memory_grows):
    rule, content = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)

    def act():
        with pytest.raises(ValueError, match=rule) as error:
            open_source(path)
        return error

    assert memory_grows(act) < 32 << 20


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.weight", (8, 512)),
        ("blk.00.attn_v.weight", (8, 512)),
        ("blk.{}.attn_v.weight", (8, 512)),
        ("blk.1234567.attn_v.weight", (8, 512)),
        ("blk.1.attn_v.weight", (8, 512)),
        ("blk.0.ffn_gate_exps.weight", (8, 512)),
        ("token_embd.scale", (8,)),
        ("enc.blk.0.attn_v.weight", (8, 512)),
    ],
)
def test_tensors_of_other_models_are_refused(name, shape, bare_llama):
    value = np.ones(shape, np.float32)
    path = bare_llama({name: (value, Type.F32)})
    with pytest.raises(ValueError, match=r"must have"):
        open_source(path)
