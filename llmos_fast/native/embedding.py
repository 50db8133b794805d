"""embedding on the CPU: csrc/cpu/embedding.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.library import register
from llmos_fast.native.common import _C, dtype_code, refusal


def unsupported(*, ids: Tensor, weight: Tensor) -> str | None:
    """Needs a CPU table in fp32 or bf16 that gets no gradient here, its rows contiguous."""
    reason = refusal(weight)
    if reason is None and torch.is_grad_enabled() and weight.requires_grad:
        return "needs a table without gradient, got weight with requires_grad"
    if reason is None and weight.stride(1) != 1 and weight.shape[1] > 1:
        return f"needs contiguous rows of weight, got strides {weight.stride()}"
    return reason


def forward(*, ids: Tensor, weight: Tensor) -> Tensor:
    """See llmos_fast.ops.embedding."""
    return _embedding(ids, weight)  # type: ignore[no-any-return]


def _embedding_cpu(ids: Tensor, weight: Tensor) -> Tensor:
    ids = ids.contiguous()
    rows, width = weight.shape
    out = torch.empty((*ids.shape, width), dtype=weight.dtype)
    _C.embedding(
        ids.data_ptr(),
        ids.dtype == torch.int64,
        weight.data_ptr(),
        out.data_ptr(),
        ids.numel(),
        rows,
        width,
        weight.stride(0),
        dtype_code(weight.dtype),
    )
    return out


def _embedding_fake(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


_embedding = register(
    "embedding(Tensor ids, Tensor weight) -> Tensor", _embedding_cpu, _embedding_fake
)
