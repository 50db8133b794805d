"""The ops: their contracts, validation and order of preference among the implementations."""

from llmos_fast.ops.add_norm import add_norm
from llmos_fast.ops.attention import attention
from llmos_fast.ops.attention_decode import attention_decode
from llmos_fast.ops.attention_weights import attention_weights
from llmos_fast.ops.cache_write import cache_write
from llmos_fast.ops.dropout import dropout
from llmos_fast.ops.embedding import embedding
from llmos_fast.ops.ffn import ffn
from llmos_fast.ops.gated_ffn import gated_ffn
from llmos_fast.ops.linear import linear
from llmos_fast.ops.linear_cross_entropy import linear_cross_entropy
from llmos_fast.ops.quant_embedding import quant_embedding
from llmos_fast.ops.quant_matmul import quant_matmul
from llmos_fast.ops.rotary import rotary

__all__ = [
    "add_norm",
    "attention",
    "attention_decode",
    "attention_weights",
    "cache_write",
    "dropout",
    "embedding",
    "ffn",
    "gated_ffn",
    "linear",
    "linear_cross_entropy",
    "quant_embedding",
    "quant_matmul",
    "rotary",
]
