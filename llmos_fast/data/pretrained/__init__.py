"""Tokenizers of published models, from the files that they come with."""

from llmos_fast.data.pretrained.loading import load_tokenizer
from llmos_fast.data.pretrained.tokenizer import PretrainedTokenizer

__all__ = ["PretrainedTokenizer", "load_tokenizer"]
