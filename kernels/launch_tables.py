"""How each attention kernel is launched: by architecture, bytes of an element and head_dim.

fp32 ends at head_dim 256: beyond it an A100's shared memory does not hold the tiles.
Launches stand in order of preference, the last one takes every call. The order is a guess from what
the compiler says until ``benchmarks/tune_attention.py`` has run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into tiles and given warps.

    Attributes:
        BLOCK_M: query rows of a tile.
        BLOCK_N: key columns of a tile.
        num_warps: of a program; warp specialization adds more of its own.
        num_stages: tiles that are loaded ahead.
        TMA: tiles are loaded by the copy engine, which needs aligned strides.
        WARP_SPECIALIZE: loads and products run in warps of their own; for plain scores only.
        light: registers suffice only for scores that are products, hidden by position or not:
            without dropout, mask, bias, ALiBi and softcap.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    TMA: bool = False
    WARP_SPECIALIZE: bool = False
    light: bool = False

    def options(self) -> dict[str, int | bool]:
        """Keywords of the launch that every kernel takes."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "TMA": self.TMA,
        }


Launches = tuple[Launch, ...]


def _light_tma(*tiles: tuple[int, int, int, int]) -> Launches:
    return tuple(Launch(*t, TMA=True, light=True) for t in tiles)


def _light_pointers(*tiles: tuple[int, int, int, int]) -> Launches:
    return tuple(Launch(*t, light=True) for t in tiles)


def _specialized(*tiles: tuple[int, int, int, int]) -> Launches:
    return tuple(Launch(*t, TMA=True, WARP_SPECIALIZE=True, light=True) for t in tiles)


def _tma(*tiles: tuple[int, int, int, int]) -> Launches:
    return tuple(Launch(*t, TMA=True) for t in tiles)


def _pointers(*tiles: tuple[int, int, int, int]) -> Launches:
    return tuple(Launch(*t) for t in tiles)


# under the interpreter: tiles that small shapes have several of
_INTERPRETED = (*_tma((32, 32, 4, 1)), *_pointers((32, 32, 4, 1)))

# kernel -> architecture -> bytes of an element -> columns of a tile
TABLE: dict[str, dict[int, dict[int, dict[int, Launches]]]] = {
    "attention_forward": {
        90: {
            2: {
                64: (
                    *_light_tma((128, 128, 8, 3), (64, 64, 4, 3)),
                    *_specialized((128, 128, 4, 3)),
                    *_tma((128, 64, 8, 3), (64, 64, 4, 3)),
                    *_pointers((64, 32, 8, 2)),
                ),
                128: (
                    *_light_tma((128, 128, 8, 2), (64, 64, 4, 3)),
                    *_specialized((128, 128, 4, 2), (128, 64, 4, 3)),
                    *_tma((128, 32, 8, 3), (64, 32, 4, 3)),
                    *_pointers((64, 32, 8, 2)),
                ),
                256: (
                    *_light_tma((128, 64, 8, 2)),
                    *_tma((64, 32, 8, 2)),
                    *_pointers((64, 16, 8, 1)),
                ),
                512: (*_light_tma((64, 32, 8, 1)), *_pointers((32, 16, 8, 1))),
            },
            4: {
                64: (*_light_tma((64, 64, 8, 2)), *_pointers((64, 32, 8, 1))),
                128: _pointers((32, 16, 8, 1)),
                256: _pointers((16, 32, 8, 1)),
            },
        },
        80: {
            2: {
                64: (*_light_pointers((128, 64, 8, 3)), *_pointers((64, 32, 4, 2))),
                128: (*_light_pointers((128, 64, 8, 2)), *_pointers((64, 32, 8, 1))),
                256: (*_light_pointers((64, 32, 8, 2)), *_pointers((32, 16, 8, 1))),
                512: _pointers((16, 16, 8, 1)),
            },
            4: {
                64: (*_light_pointers((64, 32, 4, 2)), *_pointers((32, 16, 8, 1))),
                128: _pointers((32, 16, 8, 1)),
                256: _pointers((16, 32, 8, 1)),
            },
        },
    },
    "attention_backward_key": {
        90: {
            2: {
                64: (
                    *_light_tma((64, 128, 8, 3), (64, 64, 4, 3)),
                    *_tma((32, 128, 8, 2)),
                    *_pointers((32, 64, 8, 2)),
                ),
                128: (
                    *_light_tma((64, 128, 8, 2), (64, 64, 4, 2)),
                    *_tma((32, 64, 8, 2)),
                    *_pointers((16, 64, 8, 1)),
                ),
                256: (
                    *_light_tma((32, 64, 8, 2)),
                    *_tma((16, 64, 8, 2)),
                    *_pointers((16, 32, 8, 1)),
                ),
                512: (*_tma((16, 16, 8, 1)), *_pointers((16, 16, 8, 1))),
            },
            4: {
                64: _pointers((16, 16, 8, 1)),
                128: _pointers((16, 16, 8, 1)),
                256: _pointers((16, 16, 8, 1)),
            },
        },
        80: {
            2: {
                64: (*_light_pointers((32, 64, 8, 1)), *_pointers((32, 32, 8, 1))),
                128: (*_light_pointers((32, 64, 8, 2)), *_pointers((16, 32, 8, 1))),
                256: _pointers((16, 32, 8, 1)),
                512: _pointers((16, 16, 8, 1)),
            },
            4: {
                64: _pointers((16, 16, 8, 1)),
                128: _pointers((16, 16, 8, 1)),
                256: _pointers((16, 16, 8, 1)),
            },
        },
    },
    "attention_backward_query": {
        90: {
            2: {
                64: (
                    *_light_tma((128, 128, 8, 2), (64, 64, 4, 3)),
                    *_tma((128, 64, 8, 2), (64, 32, 4, 2)),
                    *_pointers((64, 32, 8, 2)),
                ),
                128: (
                    *_light_tma((128, 64, 8, 3), (64, 64, 4, 3)),
                    *_tma((128, 32, 8, 2), (64, 32, 4, 2)),
                    *_pointers((64, 32, 8, 2)),
                ),
                256: (
                    *_light_tma((64, 64, 8, 2)),
                    *_tma((64, 32, 8, 2)),
                    *_pointers((32, 32, 8, 1)),
                ),
                512: (*_light_tma((64, 16, 8, 1)), *_pointers((32, 16, 8, 1))),
            },
            4: {
                64: _pointers((16, 16, 8, 1)),
                128: _pointers((16, 16, 8, 1)),
                256: _pointers((16, 16, 8, 1)),
            },
        },
        80: {
            2: {
                64: _pointers((32, 32, 8, 1)),
                128: _pointers((32, 32, 8, 1)),
                256: (*_light_pointers((32, 32, 8, 2)), *_pointers((16, 16, 8, 1))),
                512: _pointers((16, 16, 8, 1)),
            },
            4: {
                64: _pointers((16, 16, 8, 1)),
                128: _pointers((16, 16, 8, 1)),
                256: _pointers((16, 16, 8, 1)),
            },
        },
    },
    "attention_backward_bias": {
        90: {
            2: {
                64: _pointers((64, 32, 8, 1)),
                128: _pointers((32, 16, 8, 1)),
                256: _pointers((32, 16, 8, 1)),
                512: _pointers((32, 16, 8, 1)),
            },
            4: {
                64: _pointers((32, 16, 8, 1)),
                128: _pointers((16, 16, 8, 1)),
                256: _pointers((16, 16, 8, 1)),
            },
        },
        80: {
            2: {
                64: _pointers((32, 16, 8, 1)),
                128: _pointers((32, 16, 8, 1)),
                256: _pointers((32, 16, 8, 1)),
                512: _pointers((16, 16, 8, 1)),
            },
            4: {
                64: _pointers((32, 16, 8, 1)),
                128: _pointers((16, 16, 8, 1)),
                256: _pointers((16, 16, 8, 1)),
            },
        },
    },
}
for _by_architecture in TABLE.values():
    _by_architecture[0] = {
        size: dict.fromkeys((64, 128, 256, 512), _INTERPRETED) for size in (2, 4)
    }
