"""What the readers of several formats have in common."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def error_in(path: Path, rule: str, got: object) -> ValueError:
    """One line, however long or broken what the file holds may be."""
    return ValueError(f"open_source: {path} must {rule}, got {' '.join(str(got).split())[:200]}")


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (0, 1), (2, 3), ... to Hugging Face's (0, D/2), (1, D/2 + 1)."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
