"""Rows of a table of parameters: how tokens become vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check

implementations("embedding", "native")

_OP = "embedding"
INDEX_DTYPES = (torch.int32, torch.int64)


def embedding(ids: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """Rows of ``weight``, as torch.nn.functional.embedding.

    Args:
        ids: Int32 or Int64[...], row numbers, on weight's device.
        weight: Float[num_embeddings width].
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[... width] in the dtype of ``weight``.

    Gradients: weight.

    Raises:
        ValueError: naming op, argument, rule and value, also for ids outside of
            [0, num_embeddings); where that would wait for a device or break a graph, the lookup
            itself fails.
    """
    check.floating(_OP, weight=weight)
    check.require(weight.dim() == 2, _OP, "weight", "have 2 dimensions", tuple(weight.shape))
    check.require(ids.dtype in INDEX_DTYPES, _OP, "ids", "be int32 or int64", ids.dtype)
    if ids.device != weight.device:
        check.require(False, _OP, "ids", f"be on weight's {weight.device}", ids.device)
    return select(_OP, impl, ids=ids, weight=weight)  # type: ignore[no-any-return]
