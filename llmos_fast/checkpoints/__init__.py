"""Files of models: what others wrote, read as Hugging Face stores it, and what is written here."""

from llmos_fast.checkpoints.source import Source, open_source

__all__ = ["Source", "open_source"]
