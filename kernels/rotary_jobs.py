"""The calls of rotary that the compile gate makes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from .offline import Job, meta
from .rotary import rotate

DTYPES = (torch.bfloat16, torch.float32)


def jobs(arch: int) -> Iterator[Job]:
    """Both pairings; small heads and large ones that rotate in part, by positions, and back."""
    for dtype, interleaved, head_dim in product(DTYPES, (False, True), (64, 256)):
        yield _job(dtype, interleaved, head_dim, partial=head_dim == 256)
    yield Job("rotary bfloat16 D128 one of everything", "rotary", _smallest, lambda *_: {})


def _smallest() -> None:
    """Sizes and strides of 1 are constants in the code."""
    x, table = meta(1, 1, 1, 128, dtype=torch.bfloat16), meta(1, 64, dtype=torch.float32)
    positions = meta(1, dtype=torch.int32)
    rotate(x, x, torch.empty_like(x), torch.empty_like(x), table, table, positions, False, False)


def _job(dtype: torch.dtype, interleaved: bool, head_dim: int, partial: bool) -> Job:
    batch, heads, seq = 2, 32, 4096

    def run() -> None:
        # a slice of the packed projection
        query = meta(batch, seq, heads, 3 * head_dim, dtype=dtype)[..., :head_dim].transpose(1, 2)
        key = meta(batch, 8, seq, head_dim, dtype=dtype)
        half = (head_dim - 56) // 2 if partial else head_dim // 2
        table = meta(seq, half, dtype=torch.float32)
        positions = meta(batch, seq, dtype=torch.int64) if partial else None
        out = (torch.empty_like(query), torch.empty_like(key))
        rotate(query, key, *out, table, table, positions, interleaved, partial)

    pairs = "interleaved" if interleaved else "halves"
    more = " in part, by positions, back" if partial else ""
    name = f"rotary {str(dtype)[6:]} D{head_dim} {pairs}{more}"
    return Job(name, "rotary", run, lambda *_: {})
