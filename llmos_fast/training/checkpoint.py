"""A model on disk: weights (safetensors), settings (JSON) and vocabulary (JSON) in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_fast.checkpoints.storage import (
    current_folder,
    read_json,
    read_tensors,
    replace_folder,
    write_json,
    write_tensors,
)
from llmos_fast.data import BytePairTokenizer, Tokenizer, Vocabulary
from llmos_fast.models import Quantization, TransformerModel

_FORMAT = "llmos_fast.checkpoint"
_VERSION = 1
_TOKENIZERS: dict[str, type[Vocabulary] | type[BytePairTokenizer]] = {
    Vocabulary.kind: Vocabulary,
    BytePairTokenizer.kind: BytePairTokenizer,
}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    text:    the source the model was trained on, as ``open_corpus`` takes it
    context: tokens the model saw at once in training
    """

    model: TransformerModel
    tokenizer: Tokenizer
    text: str
    context: int
    quantization: Quantization | None = None

    def write(self, folder: Path) -> None:
        """Write the files of the checkpoint into an existing folder."""
        quantization = self.quantization
        config = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model.arguments,
            "tokenizer": self.tokenizer.kind,
            "text": self.text,
            "context": self.context,
            "quantization": None if quantization is None else vars(quantization),
        }
        write_json(folder / "config.json", config)
        self.tokenizer.save(folder / "vocabulary.json")
        write_tensors(folder / "model.safetensors", self.model.state_dict())

    def save(self, folder: Path | str) -> None:
        """Replace ``folder`` by this checkpoint, all at once or not at all.

        Raises OSError where the disk refuses; what was in ``folder`` is then still there.
        """
        with replace_folder(Path(folder)) as partial:
            self.write(partial)

    @classmethod
    def load(cls, folder: Path | str) -> Checkpoint:
        """Read a checkpoint.

        Raises FileNotFoundError where there is no such folder, ValueError where it is not a whole
        checkpoint.
        """
        folder = current_folder(Path(folder))
        if not folder.is_dir():
            raise FileNotFoundError(f"no such checkpoint folder: {folder}")
        config = read_json(folder / "config.json")
        if config.get("format") != _FORMAT or config.get("version") != _VERSION:
            raise ValueError(
                f"Checkpoint.load: {folder} must have format {_FORMAT} version {_VERSION}, "
                f"got {config.get('format')} version {config.get('version')}"
            )
        try:
            return cls._from_config(folder, config)
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"Checkpoint.load: {folder} is damaged: {error}") from error

    @classmethod
    def _from_config(cls, folder: Path, config: dict[str, Any]) -> Checkpoint:
        tokenizer = _TOKENIZERS[config["tokenizer"]].load(folder / "vocabulary.json")
        model = TransformerModel(**config["model"])
        quantization = None
        if config["quantization"] is not None:
            quantization = Quantization(**config["quantization"])
            quantization.empty_(model)
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
        return cls(model.eval(), tokenizer, config["text"], config["context"], quantization)
