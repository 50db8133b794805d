"""Counter-based dropout bits: their definition in PyTorch, and the seed an op draws for them.

Whether element (row, column) is kept depends on the seed and on these two numbers alone, so every
tiling, thread count and device draws the same bits and the backward pass draws them again instead
of storing a mask. Source of the generator: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC'11), Philox-4x32 with 7 rounds, which passes BigCrush.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw_seed(p: float, device: torch.device) -> Tensor | None:
    """Int64[] seed from torch's generator, which torch.manual_seed sets; None if p = 0."""
    if p == 0.0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """An element is kept where its 32 bits, read as an unsigned number, reach this value."""
    return min(round(p * 2**32), 2**32)


def random_bits(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """32 random bits for each (row, column), as int64.

    Args:
        seed: Int64[].
        rows: Int64[...], non-negative.
        columns: Int64[...], non-negative, broadcastable with ``rows``.

    Returns:
        Int64[...] in [0, 2^32): word ``column % 4`` of the block with the counter
        (column // 4, row mod 2^32, row // 2^32, 0) and the seed as key.
    """
    rows, columns = torch.broadcast_tensors(rows, columns)
    counter = [columns >> 2, rows & _LOW, rows >> 32, torch.zeros_like(rows)]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        product_0 = _MULTIPLIERS[0] * counter[0]  # wraps around: only its 64 bits count
        product_1 = _MULTIPLIERS[1] * counter[2]
        counter = [
            ((product_1 >> 32) & _LOW) ^ counter[1] ^ key[0],
            product_1 & _LOW,
            ((product_0 >> 32) & _LOW) ^ counter[3] ^ key[1],
            product_0 & _LOW,
        ]
        key = [(k + step) & _LOW for k, step in zip(key, _KEY_STEPS, strict=True)]
    words = torch.stack(counter)
    return words.gather(0, (columns & 3).unsqueeze(0)).squeeze(0)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by, so that the expectation stays."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def dropout_factor(seed: Tensor, p: float, rows: Tensor, columns: Tensor) -> Tensor:
    """Factor of each element: 0 where it is dropped, 1 / (1 - p) where it is kept."""
    kept = random_bits(seed, rows, columns) >= threshold(p)
    return kept * keep_scale(p)


def dropout_rows(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """``x`` with dropout; its last dimension counts columns, all others together count rows."""
    if seed is None:
        return x
    columns = torch.arange(x.shape[-1], device=x.device)
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    return x * dropout_factor(seed, p, rows, columns).to(x.dtype)
