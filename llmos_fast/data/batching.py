"""One long stream of tokens as rows that are read side by side, window after window.

The layout is that of PyTorch's word language model example with the two dimensions exchanged: here
the batch comes first, as everywhere in llmos_fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


def batchify(tokens: Tensor, batch_size: int) -> Tensor:
    """Cut ``tokens`` into ``batch_size`` consecutive rows; what is left over at the end is dropped.

    tokens:  Int[count]
    returns: Int[batch_size count//batch_size], a view: a memory-mapped stream stays on disk

    Raises ValueError where a row would hold fewer than two tokens, one to read and one to predict.
    """
    if tokens.ndim != 1:
        raise ValueError(f"batchify: tokens must have 1 dimension, got shape {tuple(tokens.shape)}")
    if batch_size < 1:
        raise ValueError(f"batchify: batch_size must be at least 1, got {batch_size}")
    length = tokens.numel() // batch_size
    if length < 2:
        raise ValueError(
            f"batchify: tokens must hold at least 2 for each of {batch_size} rows, "
            f"got {tokens.numel()}"
        )
    return tokens[: length * batch_size].view(batch_size, length)


@dataclass(frozen=True)
class Windows:
    """Windows of ``bptt`` tokens over ``rows: Int[batch length]``; the last may be shorter."""

    rows: Tensor
    bptt: int

    def __len__(self) -> int:
        return -(-(self.rows.shape[1] - 1) // self.bptt)

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Window ``index`` and the tokens that follow each of its own, both int64 [batch seq]."""
        start = index * self.bptt
        end = min(start + self.bptt, self.rows.shape[1] - 1)
        return self.rows[:, start:end].long(), self.rows[:, start + 1 : end + 1].long()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.window(index) for index in range(len(self)))


def windows(tokens: Tensor, batch_size: int, bptt: int) -> Windows:
    """Windows over the rows of ``batchify(tokens, batch_size)``.

    >>> data, targets = windows(torch.arange(9), batch_size=2, bptt=2).window(0)
    >>> data.tolist(), targets.tolist()
    ([[0, 1], [4, 5]], [[1, 2], [5, 6]])
    """
    if bptt < 1:
        raise ValueError(f"windows: bptt must be at least 1, got {bptt}")
    return Windows(batchify(tokens, batch_size), bptt)
