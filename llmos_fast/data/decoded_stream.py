"""Ids to text, one at a time, through a ``decode`` of all of them."""

from __future__ import annotations

from collections.abc import Callable


class DecodedStream:
    """What each id adds to the text of those before it; for texts of some hundred tokens.

    decode: of a list of ids; more ids only add to its text, but for an unfinished character
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self._ids, self._given = decode, list[int](), 0

    def push(self, index: int) -> str:
        """Text that became final."""
        self._ids.append(index)
        return self._new(self._decode(self._ids).rstrip("\ufffd"))

    def flush(self) -> str:
        """The rest, where the text ends in the middle of a character."""
        return self._new(self._decode(self._ids)) if self._ids else ""

    def _new(self, text: str) -> str:
        new, self._given = text[self._given :], max(self._given, len(text))
        return new
