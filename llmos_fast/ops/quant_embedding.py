"""Contract of the lookup in a quantized table."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast import dispatch
from llmos_fast.ops import check
from llmos_fast.quantize import QuantizedWeight

dispatch.implementations("quant_embedding", "native")

_OP = "quant_embedding"
INDEX_DTYPES = (torch.int32, torch.int64)


def quant_embedding(
    ids: Tensor,
    qweight: QuantizedWeight,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str = "auto",
) -> Tensor:
    """Rows of ``qweight.dequantize(dtype)``, of which no other row is read.

    Args:
        ids: Int32 or Int64[...], row numbers, on qweight's device.
        qweight: QuantizedWeight of shape (num_embeddings, embedding_dim).
        dtype: floating point, of the result.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[... embedding_dim] in ``dtype``, rounded once.

    No gradients.

    Raises:
        ValueError: naming op, argument, rule and value.
        IndexError: for ids outside of [0, num_embeddings), as torch.nn.Embedding; where that would
            wait for a device or break a graph, the device asserts it.
    """
    if not isinstance(qweight, QuantizedWeight):
        check.require(False, _OP, "qweight", "be a QuantizedWeight", type(qweight).__name__)
    check.require(ids.dtype in INDEX_DTYPES, _OP, "ids", "be int32 or int64", ids.dtype)
    device = qweight.packed.device
    if ids.device != device:
        check.require(False, _OP, "ids", f"be on qweight's {device}", ids.device)
    check.require(dtype.is_floating_point, _OP, "dtype", "be floating point", dtype)
    result: Tensor = dispatch.select(_OP, impl, ids=ids, qweight=qweight, dtype=dtype)
    return result
