"""Byte-level byte-pair encoding through the ``tokenizers`` package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmos_fast.data.decoded_stream import DecodedStream
from llmos_fast.data.vocabulary import END_OF_LINE

_BYTES = 256


class BytePairTokenizer:
    """Any text to ids and back without loss: there is no unknown word.

    Made by ``train_byte_pair`` or ``BytePairTokenizer.load``.
    """

    kind = "bpe"
    unknown_id = None

    def __init__(self, tokenizer: Tokenizer):
        end_id = tokenizer.token_to_id(END_OF_LINE)
        if end_id is None:
            raise ValueError(f"BytePairTokenizer: tokenizer must contain {END_OF_LINE}, got none")
        self.end_id: int = end_id
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, unknown: str = "map") -> list[int]:
        """Ids of ``text``; every byte has an id, so ``unknown`` never applies."""
        if unknown not in ("map", "raise"):
            raise ValueError(f"encode: unknown must be 'map' or 'raise', got {unknown!r}")
        return list(self._tokenizer.encode(text).ids)

    def encode_line(self, line: str) -> list[int]:
        """Ids of one line of a corpus, then ``<eos>``."""
        return [*self.encode(line), self.end_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; ``<eos>`` becomes a line break. Raises ValueError for other ids."""
        lines: list[list[int]] = [[]]
        for index in ids:
            if not 0 <= index < len(self):
                raise ValueError(f"decode: ids must be in 0..{len(self) - 1}, got {index}")
            if index == self.end_id:
                lines.append([])
            else:
                lines[-1].append(index)
        return "\n".join(self._tokenizer.decode(line) for line in lines)

    def stream(self) -> DecodedStream:
        """Decoder of ids that come one by one: ``push`` each, ``flush`` at the end."""
        return DecodedStream(self.decode)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to ``path`` as JSON, the format of the ``tokenizers`` package."""
        Path(path).write_text(self._tokenizer.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> BytePairTokenizer:
        """Read what ``save`` wrote. Raises ValueError where the file is anything else."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"BytePairTokenizer.load: {path} is not a tokenizer") from error
        return cls(tokenizer)


def train_byte_pair(lines: Iterable[str], vocabulary_size: int) -> BytePairTokenizer:
    """Learn the most frequent byte pairs of ``lines``.

    vocabulary_size: at least 257, the bytes and ``<eos>``; fewer are learned from a small text.
    """
    if vocabulary_size <= _BYTES:
        raise ValueError(
            f"train_byte_pair: vocabulary_size must be at least {_BYTES + 1}, got {vocabulary_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_LINE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return BytePairTokenizer(tokenizer)
