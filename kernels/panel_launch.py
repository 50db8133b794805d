"""How products with weights in panels are cut into tiles.

By rows: a few are read for, many are multiplied for. The sizes are what compiles without spilling;
no GPU has measured them yet.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import triton
from torch import Tensor

from .runtime import architecture


@dataclass(frozen=True)
class PanelLaunch:
    """Tiles [BLOCK_M, BLOCK_N] of the result, BLOCK_K of the reduction at a time.

    PART columns leave through the epilogue at a time.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    PART: int

    def options(self) -> dict[str, int]:
        """Keywords of the launch."""
        return asdict(self)

    def tiles(self, m_size: int, n_size: int) -> int:
        """Tiles of a result [m_size, n_size]."""
        return int(triton.cdiv(m_size, self.BLOCK_M) * triton.cdiv(n_size, self.BLOCK_N))


# by bytes of an element of the left operand: the first with enough rows, else the last
TABLE = {
    2: (
        PanelLaunch(16, 64, 128, 4, 4, 64),
        PanelLaunch(32, 64, 64, 4, 4, 64),
        PanelLaunch(64, 64, 64, 4, 3, 32),
        PanelLaunch(128, 128, 64, 8, 3, 32),
    ),
    4: (
        PanelLaunch(16, 32, 64, 4, 3, 32),
        PanelLaunch(64, 32, 32, 4, 3, 32),
    ),
    1: (
        PanelLaunch(16, 64, 128, 4, 4, 64),
        PanelLaunch(32, 64, 128, 4, 3, 64),
        PanelLaunch(64, 64, 128, 4, 3, 32),
        PanelLaunch(128, 128, 128, 8, 3, 32),
    ),
}
# tiles that small shapes have several of
INTERPRETED = (PanelLaunch(16, 32, 64, 4, 1, 16), PanelLaunch(32, 32, 64, 4, 1, 16))


def choose_panels(left: Tensor, group_size: int, gated: bool) -> PanelLaunch:
    """The launch for the rows of ``left`` [m k]; integers are multiplied a group at a time."""
    listed = TABLE[left.element_size()] if architecture(left.device) else INTERPRETED
    launch = next((c for c in listed if left.shape[0] <= c.BLOCK_M), listed[-1])
    if gated:  # two accumulators
        launch = replace(launch, BLOCK_N=min(launch.BLOCK_N, 64))
    if left.element_size() == 1:
        launch = replace(launch, BLOCK_K=min(launch.BLOCK_K, group_size))
    return launch
