"""The definition of rotary."""

import torch
from torch import Tensor

from llmos_fast.ops import check
from llmos_fast.reference.precision import upcast


def unsupported(**_: object) -> None:
    """Every valid call."""


def forward(
    *,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    positions: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """See llmos_fast.ops.rotary."""
    if positions is not None:
        check.rows_exist("rotary", "positions", positions, cos.shape[0], "cos")
        cos, sin = cos[positions], sin[positions]
    # [batch, 1, seq, rotary_dim / 2], or [seq, rotary_dim / 2]
    cos, sin = (t.unsqueeze(-3) if t.dim() == 3 else t for t in (cos, sin))
    turned = _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)
    return (query.copy_(turned[0]), key.copy_(turned[1])) if inplace else turned


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary_dim = 2 * cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = upcast(turned[..., 0::2]), upcast(turned[..., 1::2])
    else:
        a, b = (
            (upcast(half) for half in turned.chunk(2, dim=-1)) if rotary_dim else (turned, turned)
        )
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat((turned.to(x.dtype), passed), dim=-1)
