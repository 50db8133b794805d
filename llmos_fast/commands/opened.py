"""A model of any origin with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmos_fast.checkpoints.storage import read_json
from llmos_fast.commands.options import find_checkpoint
from llmos_fast.data import Tokenizer, load_tokenizer
from llmos_fast.models import CausalLM, EncoderDecoder, LanguageModel, load
from llmos_fast.training import Checkpoint


@dataclass(frozen=True)
class Opened:
    """A model that writes text.

    text:    the source it was trained on, as ``open_corpus`` takes it; None where nobody says
    context: tokens it saw at once in training; None where its positions say that
    """

    model: LanguageModel | EncoderDecoder
    tokenizer: Tokenizer
    text: str | None
    context: int | None


def is_pretrained(path: Path) -> bool:
    """Whether ``load`` takes it: no checkpoint of ``llmos-fast train``, and there or on the hub."""
    config = path / "config.json"
    if config.is_file():
        return "model_type" in read_json(config)
    return path.exists() or len(path.parts) == 2


def open_model(path: Path, scheme: str | None = None, group_size: int = 32) -> Opened:
    """Open a run, a checkpoint of ours, or whatever ``load`` takes.

    scheme, group_size: quantize a pretrained model as it is read

    Raises ValueError for models that write no text.
    """
    folder = find_checkpoint(path)
    if not is_pretrained(folder):
        if scheme is not None:
            raise ValueError(f"--scheme is for pretrained models; use llmos-fast quantize {path}")
        checkpoint = Checkpoint.load(folder)
        return Opened(checkpoint.model, checkpoint.tokenizer, checkpoint.text, checkpoint.context)
    model = load(folder, scheme=scheme, group_size=group_size)
    if not isinstance(model, CausalLM | EncoderDecoder):
        raise ValueError(f"{path} holds a {type(model).__name__}, which writes no text")
    return Opened(model, load_tokenizer(folder), None, None)
