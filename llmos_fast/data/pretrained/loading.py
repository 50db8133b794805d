"""The tokenizer of a pretrained model, wherever it lies."""

from __future__ import annotations

from pathlib import Path

from llmos_fast.checkpoints import open_source
from llmos_fast.data.pretrained.tokenizer import PretrainedTokenizer


def load_tokenizer(path: Path | str) -> PretrainedTokenizer:
    """The tokenizer that belongs to a model: what ``llmos_fast.load`` takes, or tokenizer files.

    A GGUF file carries its own; beside a llama2.c file or safetensors it is sought in their folder.
    Raises ValueError where there is none, or it is damaged.
    """
    where = Path(path)
    if where.is_dir():
        return PretrainedTokenizer.load(where)
    if where.is_file() and where.suffix not in (".gguf", ".safetensors", ".bin"):
        return PretrainedTokenizer.load(where)
    if where.is_file() and where.suffix == ".bin" and where.name.startswith("tok"):
        return PretrainedTokenizer.load(where)
    source = open_source(path)
    if source.tokenizer is not None:
        tokenizer, settings = source.tokenizer()
        return PretrainedTokenizer(tokenizer, **settings)
    assert source.folder is not None
    return PretrainedTokenizer.load(source.folder)
