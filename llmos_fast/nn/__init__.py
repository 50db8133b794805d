"""Drop-in replacements for torch.nn's Transformer layers."""

from llmos_fast.nn.accelerate import Report, accelerate, restore
from llmos_fast.nn.attention import MultiheadAttention
from llmos_fast.nn.cache import Cache, LayerCache
from llmos_fast.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from llmos_fast.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from llmos_fast.nn.quant_embedding import QuantEmbedding
from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.nn.quantize_model import (
    QuantizationReport,
    dequantize_,
    empty_quantized_,
    quantize_,
)
from llmos_fast.nn.transformer import Transformer

__all__ = [
    "Cache",
    "LayerCache",
    "MultiheadAttention",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizationReport",
    "Report",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "accelerate",
    "dequantize_",
    "empty_quantized_",
    "quantize_",
    "restore",
]
