"""Rows of a table of parameters: how tokens become vectors, where they stand, and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.dropout import draw_seed
from llmos_fast.ops import check

implementations("embedding", "native", "triton")

_OP = "embedding"
INDEX_DTYPES = (torch.int32, torch.int64)


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | None = None,
    seq_dim: int = -1,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """dropout(scale weight[ids] + positions) (Vaswani et al. 2017, sections 3.4, 3.5 and 5.4).

    Args:
        ids: Int32 or Int64[...], row numbers, on weight's device.
        weight: Float[num_embeddings width].
        scale: of the rows.
        positions: Float[seq width] in the dtype of ``weight``, one for each index of ids'
            dimension ``seq_dim``; or None.
        seq_dim: the dimension of ids that counts positions.
        dropout_p: probability with which elements are dropped, by bits keyed on (row, column), see
            llmos_fast.dropout.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        Float[... width] in the dtype of ``weight``.

    Gradients: weight, positions.

    Raises:
        ValueError: naming op, argument, rule and value, also for ids outside of
            [0, num_embeddings); where that would wait for a device or break a graph, the lookup
            itself fails.
    """
    check.floating(_OP, weight=weight, positions=positions)
    check.require(weight.dim() == 2, _OP, "weight", "have 2 dimensions", tuple(weight.shape))
    check.require(ids.dtype in INDEX_DTYPES, _OP, "ids", "be int32 or int64", ids.dtype)
    if ids.device != weight.device:
        check.require(False, _OP, "ids", f"be on weight's {weight.device}", ids.device)
    if positions is not None:
        check.same_dtype(_OP, weight=weight, positions=positions)
        rule = f"be a dimension of ids, which have {ids.dim()}"
        check.require(-ids.dim() <= seq_dim < ids.dim(), _OP, "seq_dim", rule, seq_dim)
        expected = (ids.shape[seq_dim], weight.shape[1])
        check.shape(_OP, "positions", positions, expected, "seq width")
    check.probability(_OP, "dropout_p", dropout_p)
    return select(  # type: ignore[no-any-return]
        _OP,
        impl,
        ids=ids,
        weight=weight,
        scale=float(scale),
        positions=positions,
        seq_dim=seq_dim % max(ids.dim(), 1),
        dropout_p=dropout_p,
        seed=draw_seed(dropout_p, weight.device),
    )
