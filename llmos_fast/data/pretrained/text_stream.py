"""Ids to text, one at a time: what each token adds to the bytes before it."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# what the WordPiece decoder of tokenizers writes without its space
_CLEANED = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")
# the bytes of a token, and whether it is the first of its text
_Rule = Callable[[str, bool], bytes]


class TextStream:
    """Text of ids that come one by one.

    All that ``push`` and at the end ``flush`` return is ``decode`` of all ids. Bytes that are no
    UTF-8 become U+FFFD.
    """

    def __init__(self, tokens: TokenBytes, hidden: Collection[int]):
        self._tokens = tokens
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def push(self, index: int) -> str:
        """Text that became final; "" in the middle of a character.

        Raises ValueError for an id without a token.
        """
        added = self._tokens(index, self._first)
        if index in self._hidden:
            return ""
        self._first = False
        return self._utf8.decode(added)

    def flush(self) -> str:
        """U+FFFD where the text ends in the middle of a character, else "". The next is new."""
        self._first = True
        return self._utf8.decode(b"", final=True)


class TokenBytes:
    """Bytes of each token, by the decoder of a ``tokenizers.Tokenizer``.

    Raises ValueError for a decoder of which text is not the sum of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer = tokenizer
        self._length = length
        self._rule = _rule(tokenizer)
        self._known: dict[tuple[int, bool], bytes] = {}

    def __call__(self, index: int, first: bool) -> bytes:
        """Bytes that id ``index`` adds; ``first``: nothing came before it."""
        known = self._known.get((index, first))
        if known is None:
            in_range = 0 <= index < self._length
            token = self._tokenizer.id_to_token(index) if in_range else None
            if token is None:
                raise ValueError(f"decode: ids must be in 0..{self._length - 1}, got {index}")
            known = self._known[index, first] = self._rule(token, first)
        return known


def _rule(tokenizer: Tokenizer) -> _Rule:
    if tokenizer.decoder is None:
        return lambda token, first: (token if first else " " + token).encode()
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    if kinds == ["WordPiece"]:
        return _word_piece(steps[0])
    fused = False
    for step, kind in zip(steps, kinds, strict=True):
        if not _is_plain(step, fused):
            raise ValueError(
                "PretrainedTokenizer: decoder must be ByteLevel, WordPiece, Metaspace or of "
                f"Replace, ByteFallback, Fuse and then a Strip of one space, got {kind}"
            )
        fused = fused or kind == "Fuse"
    return _pieces(steps)


def _is_plain(step: dict[str, Any], fused: bool) -> bool:
    match step:
        case {"type": "Replace", "pattern": {"String": str()}}:
            return not fused
        case {"type": "Strip", "start": 0 | 1, "stop": 0, "content": " "}:
            return fused
        case {"type": "ByteFallback" | "Metaspace"}:
            return not fused
    return bool(step["type"] == "Fuse")


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter of each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str, first: bool) -> bytes:
    alphabet = _byte_alphabet()
    # added tokens may have letters of which none stands for a byte
    return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()


def _word_piece(step: dict[str, Any]) -> _Rule:
    prefix, cleanup = step["prefix"], step["cleanup"]

    def rule(token: str, first: bool) -> bytes:
        if not first:
            token = token.removeprefix(prefix) if token.startswith(prefix) else " " + token
        if cleanup:
            for dirty in _CLEANED:
                token = token.replace(dirty, dirty[1:])
        return token.encode()

    return rule


def _pieces(steps: list[dict[str, Any]]) -> _Rule:
    """Sentencepiece: one space at the start of a text belongs to its first word."""
    replaced = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
    replaced += [(s["replacement"], " ") for s in steps if s["type"] == "Metaspace"]
    fallback = any(s["type"] == "ByteFallback" for s in steps)
    strips = any(
        s.get("start") == 1 if s["type"] == "Strip" else s.get("prepend_scheme", "never") != "never"
        for s in steps
    )

    def rule(token: str, first: bool) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        byte = _BYTE.fullmatch(token) if fallback else None
        raw = bytes([int(byte[1], 16)]) if byte else token.encode()
        return raw.removeprefix(b" ") if first and strips else raw

    return rule
