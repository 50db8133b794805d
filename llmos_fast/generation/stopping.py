"""Strings that end a text, wherever tokens divide them."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Lets a text through piece by piece, and holds back what may be the start of a stop string.

    Attributes:
        stopped: whether one of them came; it is not let through, nor what follows it.
    """

    def __init__(self, texts: Sequence[str]):
        if any(not text for text in texts):
            raise ValueError(f"StopTexts: texts must not be empty, got {list(texts)!r}")
        self.texts, self.stopped = tuple(texts), False
        self._held = ""

    def push(self, piece: str) -> str:
        """What is now certain to stand before any stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        # the first to be complete, however the text was divided
        found = [(at + len(stop), at) for stop in self.texts if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        hold = max((self._overlap(text, stop) for stop in self.texts), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, at the end of a text that did not go on."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """How much of the end of ``text`` is the start of ``stop``."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
