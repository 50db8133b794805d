"""Where a token stands: rotary angles for the heads, tables that are added to embeddings."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def rotary_tables(
    start: int, length: int, head_dim: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions start .. start + length (Su et al. 2021).

    Returns:
        (cos, sin), Float32[length head_dim/2] each.
    """
    cos, sin = _tables(start + length, head_dim, base, device)
    return cos[start : start + length], sin[start : start + length]


def _tables(length: int, features: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    # a tracer computes the tables in its graph: what it makes must not outlive it
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _compute_tables(length, features, base, device)
    return _remembered_tables(1 << max(length - 1, 1).bit_length(), features, base, device)


@functools.lru_cache(maxsize=32)
def _remembered_tables(
    length: int, features: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # autograd will save them later
        return _compute_tables(length, features, base, device)


def _compute_tables(
    length: int, features: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, features, 2, device=device, dtype=torch.float32) / features
    position = torch.arange(length, device=device, dtype=torch.float32)
    angle = torch.outer(position, base**-exponent)
    return angle.cos(), angle.sin()


class SinusoidalPositions(nn.Module):
    """Adds sin and cos of the position, interleaved (Vaswani et al. 2017, section 3.5).

    Args:
        d_model: features.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model

    def forward(self, x: Tensor, start: int = 0, seq_dim: int = 1) -> Tensor:
        """``x`` plus the table of positions from ``start`` on; ``seq_dim`` counts positions."""
        length = x.shape[seq_dim]
        cos, sin = rotary_tables(start, length, self.d_model, 10000.0, x.device)
        table = torch.stack((sin, cos), dim=-1).flatten(1)[:, : self.d_model]
        return x + _along(table.to(x.dtype), x, seq_dim)


class LearnedPositions(nn.Module):
    """Adds one trained vector per position.

    Args:
        max_length: positions.
        d_model: features.
        device: of the parameter.
        dtype: of the parameter.
    """

    def __init__(
        self,
        max_length: int,
        d_model: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, d_model, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=1 / math.sqrt(d_model))

    def forward(self, x: Tensor, start: int = 0, seq_dim: int = 1) -> Tensor:
        """``x`` plus the vectors of positions from ``start`` on; ``seq_dim`` counts positions.

        Raises:
            ValueError: where a position is beyond ``max_length``.
        """
        end = start + x.shape[seq_dim]
        if end > self.weight.shape[0]:
            raise ValueError(
                f"LearnedPositions: sequence must end within max_length = {self.weight.shape[0]}, "
                f"got {end}"
            )
        return x + _along(self.weight[start:end], x, seq_dim)


def _along(table: Tensor, x: Tensor, seq_dim: int) -> Tensor:
    """[length features], shaped to be added to ``x`` whose positions lie in ``seq_dim``."""
    return table.unsqueeze(1) if x.dim() == 3 and seq_dim == 0 else table


def make_positions(
    owner: str, positions: str, max_length: int | None, layer: nn.Module
) -> nn.Module:
    """The module for a ``positions`` argument, "sinusoidal" or "learned", before ``layer``.

    Raises:
        ValueError: for another name, or for "learned" without a positive ``max_length``.
    """
    attention: nn.MultiheadAttention = layer.self_attn  # type: ignore[assignment]
    if positions == "sinusoidal":
        return SinusoidalPositions(attention.embed_dim)
    if positions != "learned":
        rule = 'be None, "sinusoidal" or "learned"'
        raise ValueError(f"{owner}: positions must {rule}, got {positions!r}")
    if max_length is None or max_length < 1:
        rule = "be positive with learned positions"
        raise ValueError(f"{owner}: max_length must {rule}, got {max_length}")
    weight = attention.out_proj.weight
    return LearnedPositions(max_length, attention.embed_dim, weight.device, weight.dtype)
