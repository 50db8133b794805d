"""A training run in a folder of its own.

checkpoint/   the latest training checkpoint
tokens/       the encoded text, memory-mapped
log.csv       the numbers
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmos_fast.checkpoints.storage import current_folder
from llmos_fast.data import (
    Corpus,
    Tokenizer,
    Windows,
    build_vocab,
    open_corpus,
    open_token_file,
    train_byte_pair,
    windows,
    write_token_file,
)
from llmos_fast.models import TransformerModel
from llmos_fast.training.checkpoint import Checkpoint
from llmos_fast.training.config import TrainingConfig
from llmos_fast.training.resume import load_training_config, restore_training, save_training
from llmos_fast.training.trainer import Trainer

TOKENIZERS = ("words", "whitespace", "bpe")


@dataclass(frozen=True)
class TokenizerSettings:
    """How the text becomes tokens.

    kind:      "words" (``preprocess_text``), "whitespace" or "bpe"
    min_count: rarer words are unknown; not for "bpe"
    size:      largest number of tokens of "bpe"
    """

    kind: str = "words"
    min_count: int = 1
    size: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in TOKENIZERS:
            raise ValueError(
                f"TokenizerSettings: kind must be one of {', '.join(TOKENIZERS)}, got {self.kind!r}"
            )

    def build(self, corpus: Corpus) -> Tokenizer:
        """Learn the tokenizer from the training split."""
        lines = corpus.lines("train")
        if self.kind == "bpe":
            return train_byte_pair(lines, self.size)
        return build_vocab(lines, min_count=self.min_count, splitter=self.kind)


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of a ``TransformerModel``, apart from its vocabulary."""

    ninp: int = 200
    nhead: int = 2
    nhid: int = 200
    nlayers: int = 2
    dropout: float = 0.2


@dataclass(frozen=True)
class Run:
    """A model in training, the text it reads and the text it is measured on."""

    folder: Path
    trainer: Trainer
    checkpoint: Checkpoint
    held_out: Windows

    @property
    def checkpoint_folder(self) -> Path:
        """Where ``save`` writes."""
        return self.folder / "checkpoint"

    @property
    def log(self) -> Path:
        """The CSV log."""
        return self.folder / "log.csv"

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.checkpoint.model.parameters())

    def save(self) -> None:
        """Replace the run's checkpoint by its present state."""
        save_training(self.checkpoint_folder, self.checkpoint, self.trainer)


def start_run(
    folder: Path,
    text: str,
    tokenizer: TokenizerSettings,
    sizes: ModelSettings,
    config: TrainingConfig,
    device: str = "cpu",
) -> Run:
    """Learn the tokenizer, encode the text, and build the model from ``config.seed``.

    text: as ``open_corpus`` takes it

    Raises ValueError for empty or too little text, OSError where the folder cannot be written.
    """
    corpus = open_corpus(text)
    learned = tokenizer.build(corpus)
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        write_token_file(_token_file(folder, split), learned, corpus.lines(split))
    torch.manual_seed(config.seed)
    model = TransformerModel(
        len(learned), sizes.ninp, sizes.nhead, sizes.nhid, sizes.nlayers, sizes.dropout
    )
    return _build_run(folder, Checkpoint(model, learned, text, config.bptt), config, device)


def resume_run(
    folder: Path, device: str = "cpu", *, epochs: int | None = None, max_steps: int | None = None
) -> Run:
    """The run in ``folder``, exactly where its checkpoint was written.

    epochs, max_steps: where given, the new end of the run

    Raises FileNotFoundError where there is no checkpoint, ValueError where it is damaged.
    """
    checkpoint_folder = current_folder(folder / "checkpoint")
    checkpoint = Checkpoint.load(checkpoint_folder)
    config = load_training_config(checkpoint_folder)
    if epochs is not None:
        config = replace(config, epochs=epochs)
    if max_steps is not None:
        config = replace(config, max_steps=max_steps)
    run = _build_run(folder, checkpoint, config, device)
    restore_training(checkpoint_folder, run.trainer)
    return run


def _build_run(folder: Path, checkpoint: Checkpoint, config: TrainingConfig, device: str) -> Run:
    checkpoint.model.to(device)
    train, valid = (open_token_file(_token_file(folder, s)) for s in ("train", "valid"))
    trainer = Trainer(checkpoint.model, windows(train, config.batch_size, config.bptt), config)
    return Run(folder, trainer, checkpoint, evaluation_windows(valid, config))


def evaluation_windows(tokens: Tensor, config: TrainingConfig) -> Windows:
    """Windows to measure perplexity on; a short text is read in fewer rows."""
    rows = min(config.evaluation_batch_size, max(1, tokens.numel() // (config.bptt + 1)))
    return windows(tokens, rows, config.bptt)


def _token_file(folder: Path, split: str) -> Path:
    return folder / "tokens" / f"{split}.tokens"
