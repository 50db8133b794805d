"""llmos_fast: a fast Transformer engine for PyTorch, drop-in layers on kernels of its own."""

from llmos_fast import ops, optim, reference
from llmos_fast.data import load_tokenizer
from llmos_fast.dispatch import explain, use
from llmos_fast.models import TransformerModel, load
from llmos_fast.nn import (
    MultiheadAttention,
    QuantEmbedding,
    QuantLinear,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    accelerate,
    dequantize_,
    quantize_,
    restore,
)
from llmos_fast.quantize import QuantizedWeight, quantize
from llmos_fast.recording import Captured, capture
from llmos_fast.version import __version__

reference.publish(ops)

__all__ = [
    "Captured",
    "MultiheadAttention",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedWeight",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerModel",
    "__version__",
    "accelerate",
    "capture",
    "dequantize_",
    "explain",
    "load",
    "load_tokenizer",
    "ops",
    "optim",
    "quantize",
    "quantize_",
    "reference",
    "restore",
    "use",
]
