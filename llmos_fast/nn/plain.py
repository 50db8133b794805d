"""Sub-modules by way of an op, where nobody could tell; by an ordinary call everywhere else.

An op reads a module's parameters and never calls it. That is right only for torch.nn's own module
on which nothing was hung: a hook, a patched ``forward``, a parametrisation, an adapter put in its
place, a compiled call. Those are called, so that they do what their authors meant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from llmos_fast import ops

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
NORM = (nn.LayerNorm, nn.RMSNorm)
DROPOUT = (nn.Dropout,)


def is_observed(module: nn.Module) -> bool:
    """True where a call of ``module`` does more than run the ``forward`` of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """True where ``module`` is exactly of one of ``types`` and unobserved."""
    return type(module) in types and not is_observed(module)


def dropout_probability(module: nn.Module) -> float:
    """What a plain nn.Dropout drops now."""
    return module.p if module.training else 0.0  # type: ignore[return-value]


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for a linear layer or what stands in its place."""
    if is_plain(module, *LINEAR):
        return ops.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    return module(x)  # type: ignore[no-any-return]


def embedding(
    module: nn.Module,
    ids: Tensor,
    scale: float = 1.0,
    positions: Tensor | None = None,
    dropout: nn.Module | None = None,
) -> Tensor:
    """dropout(scale module(ids) + positions) for an embedding or what stands in its place.

    ids: Int[... seq]; positions: Float[seq width]
    """
    if (
        is_plain(module, nn.Embedding)
        and module.padding_idx is None
        and module.max_norm is None
        and not module.sparse
        and not module.scale_grad_by_freq
    ):
        table = module.weight
        positions = None if positions is None else positions.to(table.dtype)
        drops = dropout is not None and is_plain(dropout, *DROPOUT)
        dropout_p = dropout_probability(dropout) if drops else 0.0
        x = ops.embedding(ids, table, scale=scale, positions=positions, dropout_p=dropout_p)
        return x if drops or dropout is None else dropout(x)
    x = module(ids) if scale == 1.0 else module(ids) * scale
    x = x if positions is None else x + positions.to(x.dtype)
    return x if dropout is None else dropout(x)  # type: ignore[no-any-return]


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` for a normalisation layer or what stands in its place."""
    if _is_row_norm(module):
        return _add_norm(module, x, None, 0.0)[0]
    return module(x)  # type: ignore[no-any-return]


def dropout(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, which is ``x`` itself where nothing is dropped: a capture takes no copies."""
    if is_plain(module, *DROPOUT) and dropout_probability(module) == 0.0:
        return x
    return module(x)  # type: ignore[no-any-return]


def dropout_add(dropout: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """Return residual + dropout(x)."""
    if is_plain(dropout, *DROPOUT):
        return ops.dropout(x, dropout_probability(dropout), residual)
    return residual + dropout(x)  # type: ignore[no-any-return]


def dropout_add_norm(
    dropout: nn.Module, norm_module: nn.Module, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (norm(residual + dropout(x)), residual + dropout(x))."""
    if is_plain(dropout, *DROPOUT) and _is_row_norm(norm_module):
        return _add_norm(norm_module, x, residual, dropout_probability(dropout))
    total = dropout_add(dropout, x, residual)
    return norm(norm_module, total), total


def _is_row_norm(module: nn.Module) -> bool:
    """A plain LayerNorm or RMSNorm of the last dimension."""
    return is_plain(module, *NORM) and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def _add_norm(
    module: nn.Module, x: Tensor, residual: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    kind = "layer" if type(module) is nn.LayerNorm else "rms"
    bias: Tensor | None = module.bias if kind == "layer" else None  # type: ignore[assignment]
    # nn.RMSNorm(eps=None) means the eps of the dtype
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return ops.add_norm(
        x,
        residual,
        module.weight,  # type: ignore[arg-type]
        bias,
        kind=kind,
        eps=eps,  # type: ignore[arg-type]
        dropout_p=dropout_p,
    )
