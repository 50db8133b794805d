"""How the products of feed-forward and loss kernels are cut into tiles.

Launches stand from the largest tiles to the smallest; a call takes the first whose tiles are enough
for every multiprocessor, else the last. The sizes are what compiles without spilling, in an order
that no GPU has measured yet. Rows that do not begin at 16 bytes have a launch of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import triton

from .launch import forced_launches
from .runtime import architecture, multiprocessors


@dataclass(frozen=True)
class ProductLaunch:
    """Tiles and warps of a product [M, K] by [K, N].

    Attributes:
        BLOCK_M: rows of a tile of the result.
        BLOCK_N: its columns.
        BLOCK_K: of the reduction, loaded at a time.
        num_warps: of a program.
        num_stages: blocks of K that are loaded ahead.
        PART: columns that the epilogue takes at a time; those of a tile would spill registers.
        GROUP_M: tiles that are taken down before one to the right.
        TMA: loaded by the copy engine, which needs aligned strides.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    PART: int
    GROUP_M: int = 8
    TMA: bool = False

    def options(self) -> dict[str, int | bool]:
        """Keywords of the launch."""
        return asdict(self)

    def tiles(self, m_size: int, n_size: int) -> int:
        """Tiles of a result [m_size, n_size]."""
        return int(triton.cdiv(m_size, self.BLOCK_M) * triton.cdiv(n_size, self.BLOCK_N))


Launches = tuple[ProductLaunch, ...]


def _hopper(*tiles: tuple[int, int, int, int, int, int]) -> Launches:
    return tuple(ProductLaunch(*t, TMA=True) for t in tiles)


def _ampere(*tiles: tuple[int, int, int, int, int, int]) -> Launches:
    return tuple(ProductLaunch(*t) for t in tiles)


# rows that begin at odd addresses: they pass through registers on their way to shared memory
UNALIGNED = {
    1: ProductLaunch(32, 32, 64, 4, 2, 16),
    2: ProductLaunch(32, 32, 32, 4, 2, 16),
    4: ProductLaunch(32, 16, 16, 4, 2, 16),
}
_INTERPRETED = (ProductLaunch(32, 32, 32, 4, 1, PART=16),)
# by kernel, architecture, bytes of an element and accumulators of a tile
TABLE: dict[str, dict[int, dict[int, dict[int, Launches]]]] = {
    "product": {
        90: {
            # fp8: 128 of K have a sum of their own, which takes as many registers as that of a tile
            1: {
                1: _hopper((128, 128, 128, 8, 4, 64), (64, 128, 128, 4, 4, 64)),
                2: _hopper((128, 64, 128, 8, 4, 64), (64, 64, 128, 4, 4, 64)),
            },
            2: {
                1: _hopper(
                    (128, 256, 64, 8, 3, 64), (128, 128, 64, 8, 4, 64), (64, 128, 64, 4, 4, 64)
                ),
                2: _hopper(
                    (128, 128, 64, 8, 3, 64), (64, 128, 64, 4, 3, 64), (64, 64, 64, 4, 4, 32)
                ),
            },
            4: {1: _hopper((64, 64, 32, 4, 3, 32)), 2: _hopper((64, 64, 32, 8, 2, 32))},
        },
        80: {
            2: {
                1: _ampere(
                    (128, 128, 32, 8, 3, 64), (64, 128, 32, 4, 4, 64), (64, 64, 64, 4, 3, 32)
                ),
                2: _ampere((128, 64, 32, 4, 4, 32), (64, 64, 32, 4, 4, 32)),
            },
            4: {1: _ampere((64, 64, 32, 4, 3, 32)), 2: _ampere((64, 32, 32, 4, 3, 16))},
        },
        0: {size: dict.fromkeys((1, 2), _INTERPRETED) for size in (1, 2, 4)},
    },
    "ffn_backward": {
        90: {
            2: {
                1: _hopper((128, 128, 64, 8, 4, 32), (64, 128, 64, 4, 4, 32)),
                2: _hopper((128, 128, 64, 8, 3, 16), (64, 64, 64, 4, 4, 32)),
                3: _hopper((128, 64, 64, 8, 3, 16), (64, 64, 64, 4, 3, 16)),
            },
            4: {
                1: _hopper((64, 64, 32, 4, 3, 32)),
                2: _hopper((64, 64, 32, 8, 2, 32)),
                3: _hopper((64, 32, 32, 4, 2, 16)),
            },
        },
        80: {
            2: {
                1: _ampere((128, 128, 32, 8, 3, 32), (64, 64, 64, 4, 3, 32)),
                2: _ampere((64, 64, 32, 4, 4, 32)),
                3: _ampere((64, 64, 32, 4, 3, 16), (64, 32, 64, 4, 3, 16)),
            },
            4: {
                1: _ampere((64, 64, 32, 4, 3, 32)),
                2: _ampere((64, 32, 32, 4, 3, 8)),
                3: _ampere((32, 32, 32, 4, 3, 16)),
            },
        },
        0: {size: dict.fromkeys((1, 2, 3), _INTERPRETED) for size in (2, 4)},
    },
    "cross_entropy_forward": {
        90: {
            2: {1: _hopper((128, 256, 64, 8, 3, 64), (64, 128, 64, 4, 4, 64))},
            4: {1: _hopper((64, 64, 32, 4, 3, 32))},
        },
        80: {
            2: {1: _ampere((128, 128, 32, 8, 3, 64), (64, 64, 64, 4, 3, 32))},
            4: {1: _ampere((64, 64, 32, 4, 3, 32))},
        },
        0: {size: {1: _INTERPRETED} for size in (2, 4)},
    },
    "cross_entropy_backward": {
        90: {
            2: {1: _hopper((128, 256, 64, 8, 3, 32), (128, 128, 64, 8, 4, 32))},
            4: {1: _hopper((64, 64, 32, 4, 3, 32))},
        },
        80: {
            2: {1: _ampere((128, 128, 32, 8, 3, 32), (64, 64, 64, 4, 3, 32))},
            4: {1: _ampere((64, 64, 32, 4, 3, 32))},
        },
        0: {size: {1: _INTERPRETED} for size in (2, 4)},
    },
    "cross_entropy_hidden": {
        90: {
            2: {1: _hopper((128, 256, 64, 8, 3, 32), (128, 128, 64, 8, 4, 32))},
            4: {1: _hopper((64, 64, 32, 4, 3, 32))},
        },
        80: {
            2: {1: _ampere((128, 128, 32, 8, 3, 64), (64, 64, 64, 4, 3, 32))},
            4: {1: _ampere((64, 64, 32, 4, 3, 32))},
        },
        0: {size: {1: _INTERPRETED} for size in (2, 4)},
    },
}


def choose_product(
    kernel: str, x: torch.Tensor, n_size: int, accumulators: int, aligned: bool
) -> ProductLaunch:
    """The launch of ``kernel`` for the rows of ``x`` and ``n_size`` columns of the result."""
    if kernel in forced_launches:
        forced: ProductLaunch = forced_launches[kernel]
        return replace(forced, TMA=forced.TMA and aligned)
    arch = architecture(x.device)
    if not aligned and arch > 0:
        return UNALIGNED[x.element_size()]
    listed = TABLE[kernel][arch][x.element_size()][accumulators]
    return next((c for c in listed if _fills(c, x, n_size)), listed[-1])


def _fills(config: ProductLaunch, x: torch.Tensor, n_size: int) -> bool:
    return config.tiles(x.shape[0], n_size) >= multiprocessors(x.device)
