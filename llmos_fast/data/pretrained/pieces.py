"""Vocabularies of scored pieces as ``tokenizers``: sentencepiece's files and llama2.c's.

A sentencepiece model is a protocol buffer; the few fields that decide an encoding are read here.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LLAMA2C_NAMES = ("<unk>", "<s>", "</s>")
_Kind = TypeVar("_Kind", int, bytes)


class Pieces(NamedTuple):
    """A tokenizer and what its file says about ids."""

    tokenizer: Tokenizer
    begin_id: int | None
    end_id: int | None
    pad_id: int | None
    unknown_id: int | None
    unigram: bool


def read_llama2c(path: Path, raw: bytes) -> Pieces:
    """llama2.c's ``tokenizer.bin``: int32 longest token, of each fp32 score, int32 length, bytes.

    Encodes as ``run.c``: a space first, then always the merge with the best score. Where the
    vocabulary lacks the 256 bytes, a letter it lacks is ``<unk>``.
    """
    scores: dict[str, float] = {}
    longest, offset = struct.unpack_from("<i", raw)[0] if len(raw) >= 4 else 0, 4
    if not 0 < longest <= len(raw):
        raise ValueError(f"{path}: the longest token must have 1..{len(raw)} bytes, got {longest}")
    while offset < len(raw):
        index = len(scores)
        if offset + 8 > len(raw):
            raise ValueError(f"{path}: token {index} is cut off")
        score, length = struct.unpack_from("<fi", raw, offset)
        offset += 8
        if not 0 < length <= longest:
            raise ValueError(f"{path}: token {index} must have 1..{longest} bytes, got {length}")
        if offset + length > len(raw):
            raise ValueError(f"{path}: token {index} is cut off")
        token = _text(raw[offset : offset + length], path, index)
        offset += length
        # llama2.c writes line breaks around the names of the first three
        token = token.strip("\n") if index < len(_LLAMA2C_NAMES) else token
        _add(scores, token, score, path)
    if tuple(scores)[:3] != _LLAMA2C_NAMES:
        raise ValueError(f"{path}: the first tokens must be <unk>, <s>, </s>")
    with_bytes = list(scores)[3:259] == _BYTES
    mergeable = list(scores)[259 if with_bytes else 3 :]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(scores)},
            merges=_merges(scores, mergeable, path),
            unk_token="<unk>",
            fuse_unk=False,
            byte_fallback=with_bytes,
        )
    )
    if " " in scores:
        tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = _decoder(None, with_bytes, strips=True)
    tokenizer.add_special_tokens([_special(name) for name in _LLAMA2C_NAMES])
    return Pieces(tokenizer, 1, 2, None, 0, unigram=False)


def read_sentencepiece(path: Path, raw: bytes) -> Pieces:
    """A sentencepiece model of kind BPE (Llama) or Unigram (T5).

    Unlike there, the names of control tokens in a text are these tokens, as in ``transformers``;
    so are those of byte tokens in a Unigram model.
    """
    try:
        model = _fields(raw)
        trainer, normalizer = _message(model, 2), _message(model, 3)
        listed = [_fields(piece) for piece in model.get(1, [])]
        names = [_text(_last(piece, 1, b""), path, i) for i, piece in enumerate(listed)]
        given = [struct.unpack("<f", _last(piece, 2, bytes(4)))[0] for piece in listed]
        kinds = [_last(piece, 3, _NORMAL) for piece in listed]
        charsmap = _last(normalizer, 2, b"")
        prefix, strip, escape = (bool(_last(normalizer, i, 1)) for i in (3, 4, 5))
        kind = _last(trainer, 3, _UNIGRAM)
        bytes_too, suffix = (bool(_last(trainer, i, 0)) for i in (35, 24))
        begin, end, pad = (_signed(_last(trainer, i, d)) for i, d in ((41, 1), (42, 2), (43, -1)))
    except (TypeError, struct.error, IndexError) as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    scores: dict[str, float] = {}
    for name, score in zip(names, given, strict=True):
        _add(scores, name, score, path)
    unknown = [i for i, of in enumerate(kinds) if of == _UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(
            f"{path} is not a sentencepiece model: it has {len(unknown)} unknown tokens"
        )
    if kind not in (_UNIGRAM, _BPE) or suffix or not escape or _UNUSED in kinds:
        raise ValueError(
            f"{path}: only BPE and Unigram models with spaces before words and without unused "
            "pieces are read; convert the model to a tokenizer.json"
        )
    if bytes_too and not scores.keys() >= set(_BYTES):
        raise ValueError(f"{path}: byte fallback must come with the 256 byte tokens")
    mergeable = [name for name, of in zip(names, kinds, strict=True) if of == _NORMAL]
    own = [name for name, of in zip(names, kinds, strict=True) if of == _USER_DEFINED]
    if kind == _BPE:
        core: Any = models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(scores, mergeable, path),
            unk_token=names[unknown[0]],
            fuse_unk=True,
            byte_fallback=bytes_too,
            ignore_merges=bool(own),
        )
    else:
        core = models.Unigram(list(scores.items()), unknown[0], bytes_too)
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = _normalizer(charsmap, prefix, strip)
    if own:
        # they stay whole (``ignore_merges``) and none is part of a merge
        pattern = "|".join(re.escape(name) for name in sorted(own, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = _decoder(_SPACE, bytes_too, prefix)
    special = [name for name, of in zip(names, kinds, strict=True) if of in (_CONTROL, _UNKNOWN)]
    tokenizer.add_special_tokens([_special(name) for name in special])
    found = [i if 0 <= i < len(names) and kinds[i] == _CONTROL else None for i in (begin, end, pad)]
    return Pieces(tokenizer, found[0], found[1], found[2], unknown[0], kind == _UNIGRAM)


def _normalizer(charsmap: bytes, prefix: bool, strip: bool) -> Any:
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if strip:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", _SPACE))
    if prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence(steps)


def _decoder(space: str | None, with_bytes: bool, strips: bool) -> Any:
    steps: list[Any] = [decoders.Replace(space, " ")] if space else []
    if with_bytes:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if strips:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _merges(
    scores: Mapping[str, float], mergeable: Collection[str], path: Path
) -> list[tuple[str, str]]:
    """Every pair that makes a token, best score first.

    ``tokenizers`` ranks merges and sentencepiece takes the leftmost of equals: pieces of equal
    scores have no such order and are refused.
    """
    parts = set(mergeable)
    merges = []
    owner: dict[float, str] = {}
    for token in mergeable:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(-scores[token], *pair) for pair in splits if parts.issuperset(pair)]
        if pairs and owner.setdefault(scores[token], token) != token:
            raise ValueError(
                f"{path}: merged tokens must have distinct scores, got {scores[token]} for "
                f"{owner[scores[token]]!r} and {token!r}"
            )
        merges += pairs
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _add(scores: dict[str, float], token: str, score: float, path: Path) -> None:
    if not token:
        raise ValueError(f"{path}: tokens must not be empty, got token {len(scores)}")
    if token in scores:
        raise ValueError(f"{path}: tokens must be distinct, got {token!r} more than once")
    if not math.isfinite(score):
        raise ValueError(f"{path}: scores must be finite, got {score} for {token!r}")
    scores[token] = score


def _text(raw: bytes, path: Path, index: int) -> str:
    try:
        return str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: token {index} must be UTF-8, got {raw!r}") from error


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _message(fields: dict[int, list[Any]], number: int) -> dict[int, list[Any]]:
    return _fields(b"".join(fields.get(number, [])))


def _last(fields: Mapping[int, list[Any]], number: int, default: _Kind) -> _Kind:
    value = fields.get(number, [default])[-1]
    if type(value) is not type(default):
        raise TypeError(f"field {number} is of another kind")
    return value


def _fields(raw: bytes) -> dict[int, list[Any]]:
    """Fields of a protocol buffer by number: int, or bytes (also of fixed width)."""
    fields: dict[int, list[Any]] = {}
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 64, 7):
            byte = raw[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError("a number of more than 64 bits")

    while position < len(raw):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            fields.setdefault(number, []).append(varint())
            continue
        length = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else None)
        if length is None or length > len(raw) - position:
            raise IndexError("a field is cut off or of no known kind")
        fields.setdefault(number, []).append(raw[position : position + length])
        position += length
    return fields


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
