"""The dense weight of panels, for gradients and for products of many rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .matrix import matrix, store_tile
from .panels import Panels, load_weight
from .runtime import launch

BLOCK_N, BLOCK_K = 64, 64


@triton.jit
def panel_weight_tiles(
    out, words, scales, zeros, n_size, k_size, word_columns, groups,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out`` [n k]: scale times level, rounded once."""
    n = tl.program_id(0) * BLOCK_N
    k = tl.program_id(1) * BLOCK_K
    weight = load_weight(
        words, scales, zeros, n, k, n_size, word_columns, groups, FORMAT, GROUP, 0,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    store_tile(weight, out, n, k, n_size, k_size, BLOCK_N, BLOCK_K)


def panel_weight(weight: Panels, out: Tensor) -> None:
    """Write ``weight`` [n k] to ``out``."""
    n_size, k_size = out.shape
    launch(
        panel_weight_tiles,
        (triton.cdiv(n_size, BLOCK_N), triton.cdiv(k_size, BLOCK_K)),
        out.device,
        out=matrix(out),
        **weight._asdict(),
        n_size=n_size,
        k_size=k_size,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )
