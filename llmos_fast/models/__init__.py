"""Models built on the layers."""

from llmos_fast.models.causal_lm import CausalLM
from llmos_fast.models.config import ModelConfig, Rotary
from llmos_fast.models.encoder_decoder import EncoderDecoder
from llmos_fast.models.encoder_model import EncoderModel
from llmos_fast.models.language_model import LanguageModel
from llmos_fast.models.loading import build, load
from llmos_fast.models.paged_cache import PagedCache
from llmos_fast.models.pretrained import Pretrained, Quantization
from llmos_fast.models.transformer_model import TransformerModel

__all__ = [
    "CausalLM",
    "EncoderDecoder",
    "EncoderModel",
    "LanguageModel",
    "ModelConfig",
    "PagedCache",
    "Pretrained",
    "Quantization",
    "Rotary",
    "TransformerModel",
    "build",
    "load",
]
