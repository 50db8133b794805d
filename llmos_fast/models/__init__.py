"""Models built on the layers."""

from llmos_fast.models.language_model import LanguageModel
from llmos_fast.models.transformer_model import TransformerModel

__all__ = ["LanguageModel", "TransformerModel"]
