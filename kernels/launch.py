"""The choice of an attention launch, by a pure function of the call.

launch_tables.py lists the launches for a kernel in order of preference. All of them are compiled
and gated by the tests (no spills, shared memory within the limit), and those that the self-test
struck off on this machine are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from .attention_arguments import Arguments
from .attention_rows import fits_tma
from .launch_tables import TABLE, Launch
from .ptxas import REMEDY
from .runtime import architecture

__all__ = [
    "TABLE", "Launch", "Pinned", "Variant", "choose", "forced", "padded", "section",
    "unless_forced",
]  # fmt: skip

L = TypeVar("L")

# half of the H200's L2 cache, so that the next section's rows do not push out this one's
L2_BYTES = 25 * 2**20


class Variant(NamedTuple):
    """A launch, and what else decides about the code of a kernel's loop: the self-test judges it.

    Attributes:
        kernel: its name.
        launch: how it is cut into tiles.
        head_dim: columns of a tile, of query or value, whichever are more.
        dtype: of query, key and value.
        hides: whether keys are hidden by their position: causal, or a window.
    """

    kernel: str
    launch: Launch
    head_dim: int
    dtype: torch.dtype
    hides: bool


class Pinned(Arguments):
    """A call that brings its launches, by kernel: unlike ``forced``, no other thread sees them."""

    launches: dict[str, Launch]


# what the self-test found wrong on this machine
struck_off: set[Variant] = set()
# by kernel, inside of ``forced``: Launch for attention, each other kernel's own class
forced_launches: dict[str, Any] = {}


@lru_cache
def padded(head_dim: int) -> int:
    """Columns of a tile: a power of two, 64 at least (triton 3.7.1's wgmma crashes on fewer)."""
    return max(64, int(triton.next_power_of_2(head_dim)))


def choose(kernel: str, a: Arguments, loaded: Sequence[Tensor]) -> Launch:
    """The launch of ``kernel`` for a call; ``loaded`` are the tensors that it reads by tiles."""
    if isinstance(a, Pinned):
        return a.launches[kernel]
    aligned = all(fits_tma(t) for t in loaded)
    if kernel in forced_launches:
        pinned: Launch = forced_launches[kernel]
        return replace(pinned, TMA=pinned.TMA and aligned)
    head_dim = padded(max(a.query.shape[-1], a.value.shape[-1]))
    listed = candidates(kernel, a.query.device, a.query.dtype, head_dim)
    hides = bool(a.causal) or a.window_left >= 0 or a.window_right >= 0
    for launch in listed:
        fits = (
            (aligned or not launch.TMA)
            and (_plain(a) or not launch.WARP_SPECIALIZE)
            and (_light(a) or not launch.light)
            and max(64, 2 * a.longest[0]) >= launch.BLOCK_M
        )
        variant = Variant(kernel, launch, head_dim, a.query.dtype, hides)
        if (fits or launch is listed[-1]) and usable(variant, a.query.device):
            return launch
    reason = f"no launch of {kernel} that takes this call passed the self-test"
    raise RuntimeError(f"attention: {reason}; {REMEDY}")


def candidates(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[Launch, ...]:
    """The launches in order of preference; the last one fits every call."""
    return TABLE[kernel][architecture(device)][dtype.itemsize][head_dim]


def usable(variant: Variant, device: torch.device) -> bool:
    """Whether the self-test, which runs before a first use, has nothing against it."""
    from . import self_test  # it launches kernels, which choose their launches here

    self_test.ensure(variant, device)
    return variant not in struck_off


def _light(a: Arguments) -> bool:
    """Scores are the scaled products, hidden by position or not."""
    extras = (a.mask, a.bias, a.alibi_slopes, a.seed)
    return all(t is None for t in extras) and a.softcap == 0 and a.scale > 0


def _plain(a: Arguments) -> bool:
    """... and hidden only because they are causal."""
    extras = (a.sinks, a.cu_seqlens_q, a.key_lengths)
    return _light(a) and all(t is None for t in extras) and a.window_left < 0


def section(a: Arguments) -> int:
    """Heads whose keys and values are read together; see ``schedule``."""
    if not a.causal and a.window_right < 0:
        return 1  # all tiles of a head take as long: one head after the other
    heads_q, heads_kv = a.heads
    columns = a.key.shape[-1] + a.value.shape[-1]
    head_bytes = a.longest[1] * columns * a.key.element_size() * heads_kv / heads_q
    return max(1, min(a.batch * heads_q, int(L2_BYTES / max(head_bytes, 1))))


def unless_forced(kernel: str, launch: L) -> L:
    """``launch``, or what ``forced`` has for that kernel."""
    forced_launch: L = forced_launches.get(kernel, launch)
    return forced_launch


@contextmanager
def forced(**launches: Any) -> Iterator[None]:
    """Inside, the named kernels are launched so; for tests and for the tuner."""
    previous = dict(forced_launches)
    forced_launches.update(launches)
    try:
        yield
    finally:
        forced_launches.clear()
        forced_launches.update(previous)
