"""Word-level vocabulary: text to ids and back."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llmos_fast.data.decoded_stream import DecodedStream

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
_FORMAT = "llmos_fast.vocabulary"
# The two markers, or a run of letters and digits of any script with apostrophes inside it.
_WORD = re.compile(r"<unk>|<eos>|[^\W_]+(?:['\u2019][^\W_]+)*")


def preprocess_text(text: str) -> list[str]:
    """Lower-case ``text``, strip its special characters and split it into words.

    Letters, digits and apostrophes inside a word stay ("don't"); everything else separates words.
    The markers ``<unk>`` and ``<eos>`` stay whole.
    """
    return _WORD.findall(text.lower())


SPLITTERS: dict[str, Callable[[str], list[str]]] = {
    "words": preprocess_text,
    "whitespace": str.split,
}


class Vocabulary:
    """A fixed list of words; a word's id is its place in the list.

    words:    distinct words; must hold ``<unk>`` and ``<eos>``.
    splitter: how ``encode`` splits text: "words" (``preprocess_text``) or "whitespace".
    """

    kind = "words"

    def __init__(self, words: Sequence[str], splitter: str = "words"):
        if splitter not in SPLITTERS:
            raise ValueError(
                f"Vocabulary: splitter must be one of {', '.join(SPLITTERS)}, got {splitter!r}"
            )
        self.words = list(words)
        self.splitter = splitter
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            repeated = Counter(self.words).most_common(1)[0][0]
            raise ValueError(f"Vocabulary: words must be distinct, got {repeated!r} more than once")
        for marker in (UNKNOWN, END_OF_LINE):
            if marker not in self._ids:
                raise ValueError(f"Vocabulary: words must contain {marker}, got none")
        self.unknown_id = self._ids[UNKNOWN]
        self.end_id = self._ids[END_OF_LINE]

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def encode(self, text: str, unknown: str = "map") -> list[int]:
        """Ids of the words of ``text``.

        unknown: "map" gives words outside the vocabulary the id of ``<unk>``; "raise" raises
                 ValueError with the first of them.
        """
        if unknown not in ("map", "raise"):
            raise ValueError(f"encode: unknown must be 'map' or 'raise', got {unknown!r}")
        words = SPLITTERS[self.splitter](text)
        if unknown == "raise":
            for word in words:
                if word not in self._ids:
                    raise ValueError(f"encode: {word!r} is not one of the {len(self)} known words")
        return [self._ids.get(word, self.unknown_id) for word in words]

    def encode_line(self, line: str) -> list[int]:
        """Ids of one line of a corpus: its words, then ``<eos>``."""
        return [*self.encode(line), self.end_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ``ids`` with spaces between them; ``<eos>`` becomes a line break.

        Raises ValueError for an id outside the vocabulary.
        """
        words = []
        for index in ids:
            if not 0 <= index < len(self.words):
                raise ValueError(f"decode: ids must be in 0..{len(self) - 1}, got {index}")
            words.append("\n" if index == self.end_id else self.words[index])
        return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")

    def stream(self) -> DecodedStream:
        """Decoder of ids that come one by one: ``push`` each, ``flush`` at the end."""
        return DecodedStream(self.decode)

    def save(self, path: Path | str) -> None:
        """Write the vocabulary to ``path`` as JSON."""
        content = {"format": _FORMAT, "splitter": self.splitter, "words": self.words}
        Path(path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Vocabulary:
        """Read what ``save`` wrote. Raises ValueError where the file is anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            words, splitter = content["words"], content["splitter"]
            valid = content["format"] == _FORMAT and isinstance(words, list)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Vocabulary.load: {path} is not a vocabulary ({error})") from error
        if not valid or not all(isinstance(word, str) for word in words):
            raise ValueError(f"Vocabulary.load: {path} is not a vocabulary")
        return cls(words, splitter)


def build_vocab(lines: Iterable[str], *, min_count: int = 1, splitter: str = "words") -> Vocabulary:
    """Vocabulary of all words that occur at least ``min_count`` times in ``lines``.

    ``<unk>`` is 0, ``<eos>`` is 1, then the most frequent word first, equals in the order they
    appear. Raises ValueError where the text has no word.
    """
    if min_count < 1:
        raise ValueError(f"build_vocab: min_count must be at least 1, got {min_count}")
    if splitter not in SPLITTERS:
        raise ValueError(
            f"build_vocab: splitter must be one of {', '.join(SPLITTERS)}, got {splitter!r}"
        )
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(SPLITTERS[splitter](line))
    if not counts:
        raise ValueError("build_vocab: lines must hold at least one word, got empty text")
    frequent = [word for word, count in counts.most_common() if count >= min_count]
    markers = [UNKNOWN, END_OF_LINE]
    return Vocabulary([*markers, *(w for w in frequent if w not in markers)], splitter)
