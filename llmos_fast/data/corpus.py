"""Where text comes from: the shipped WikiText-2, any file or folder, or the ``datasets`` package.

Every source is read line by line, so a corpus may be larger than memory.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

SPLITS = ("train", "valid", "test")
WIKITEXT2 = Path(__file__).parent / "wikitext2"
_ONLINE = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-v1"),
    "tinystories": ("roneneldan/TinyStories", None),
}
# Of text without splits of its own: this share trains; half of the rest validates, half tests.
_TRAIN_SHARE = 0.9


class Corpus(Protocol):
    """Text in three splits."""

    def lines(self, split: str) -> Iterator[str]:
        """Lines of one split ("train", "valid" or "test"), without their line ends."""


def open_corpus(source: str) -> Corpus:
    """Text by name or path.

    source: "wikitext-2" (shipped), a name for the ``datasets`` package ("wikitext-103",
            "tinystories" or "hf:owner/name"), a text file, or a folder. A folder may hold one file
            per split, named like train.txt, wiki.valid.tokens or test.txt.xz; otherwise all its
            .txt files are read in order of their names and the last tenth of the lines is held out.

    Raises FileNotFoundError where nothing is there, ValueError for a folder without text,
    ImportError where ``datasets`` is needed and missing.
    """
    if source == "wikitext-2":
        return SplitFiles({split: WIKITEXT2 / f"{split}.txt.xz" for split in SPLITS})
    if source in _ONLINE:
        return OnlineCorpus(*_ONLINE[source])
    if source.startswith("hf:"):
        return OnlineCorpus(source.removeprefix("hf:"), None)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no such text file, folder or data set: {source}")
    return WholeText((path,))


def _open_folder(folder: Path) -> Corpus:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    by_split = {split: path for split in SPLITS for path in files if split in path.name.split(".")}
    if "train" in by_split and "valid" in by_split:
        return SplitFiles(by_split)
    texts = tuple(path for path in files if {".txt", ".xz"} & set(path.suffixes[-2:]))
    if not texts:
        raise ValueError(f"open_corpus: source must hold .txt files, found none in {folder}")
    return WholeText(texts)


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 text file, plain or .xz. Raises ValueError where it is neither."""
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"read_lines: {path} must be UTF-8 text ({error})") from error
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"read_lines: {path} is not a whole .xz file ({error})") from error


class SplitFiles(NamedTuple):
    """One file per split."""

    files: dict[str, Path]

    def lines(self, split: str) -> Iterator[str]:
        """Lines of the split's file. Raises ValueError where it has none."""
        if split not in self.files:
            raise ValueError(f"lines: split must be one of {', '.join(self.files)}, got {split!r}")
        return read_lines(self.files[split])


class WholeText(NamedTuple):
    """Files without splits: the last tenth of their lines is held out."""

    files: tuple[Path, ...]

    def lines(self, split: str) -> Iterator[str]:
        """Lines of one split; the text is read once more to count them.

        Raises ValueError where there is nothing to hold out.
        """
        if split not in SPLITS:
            raise ValueError(f"lines: split must be one of {', '.join(SPLITS)}, got {split!r}")
        count = sum(1 for _ in self._all_lines())
        if count < 2:
            raise ValueError(f"lines: text must have at least 2 lines, got {count}")
        train_end = max(1, int(count * _TRAIN_SHARE))
        valid_end = (train_end + count + 1) // 2
        start, end = {
            "train": (0, train_end),
            "valid": (train_end, valid_end),
            "test": (valid_end, count),
        }[split]
        return islice(self._all_lines(), start, end)

    def _all_lines(self) -> Iterator[str]:
        for path in self.files:
            yield from read_lines(path)


class OnlineCorpus:
    """A data set of the ``datasets`` package, downloaded on first use."""

    def __init__(self, name: str, configuration: str | None):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"the data set {name} needs the datasets package: pip install llmos-fast[datasets]"
            ) from error
        self._dataset = datasets.load_dataset(name, configuration, streaming=True)

    def lines(self, split: str) -> Iterator[str]:
        """Lines of the "text" column of a split. Raises ValueError where there is no such split."""
        name = "validation" if split == "valid" else split
        if name not in self._dataset:
            raise ValueError(
                f"lines: split must be one of {', '.join(self._dataset)}, got {name!r}"
            )
        for row in self._dataset[name]:
            # Some sets keep the line end in their rows, WikiText among them.
            yield from row["text"].removesuffix("\n").split("\n")
