"""Keys and values of every layer in pages, which sequences share until they part.

Source: Kwon et al. 2023 (PagedAttention, arXiv 2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmos_fast import ops

PAGE = 64  # tokens; a multiple of ops.attention_decode's 16


class PagedCache:
    """What ``layers`` layers remember of a batch of sequences.

    Attributes:
        lengths: Int64[batch], tokens of each sequence.
        block_table: Int32[batch pages_per_sequence], where they are.
        moves: counts how often tensors were replaced, which a captured step would not notice.

    Args:
        layers: with a cache each.
        kv_heads: of each.
        head_dim: of keys and values.
        dtype: of keys and values: the model's, or int8, which gives each row a scale.
        device: of all of it.
        tokens: of all sequences together to make room for at first; it grows by itself.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        tokens: int = 256,
    ):
        self.device, self.moves = torch.device(device), 0
        pages = max(1, -(-tokens // PAGE))
        shape = (pages, kv_heads, PAGE, head_dim)
        self._layers = [
            {
                "key_cache": torch.zeros(shape, dtype=dtype, device=device),
                "value_cache": torch.zeros(shape, dtype=dtype, device=device),
            }
            for _ in range(layers)
        ]
        if dtype == torch.int8:
            for layer in self._layers:
                for name in ("key_scale", "value_scale"):
                    layer[name] = torch.zeros(shape[:3], dtype=torch.float32, device=device)
        self._owners = [0] * pages  # sequences that a page belongs to
        self._pages: list[list[int]] = []
        self._lengths: list[int] = []
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self.block_table = torch.zeros((0, 1), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales."""
        return sum(tensor.nbytes for layer in self._layers for tensor in layer.values())

    @property
    def sequence_lengths(self) -> list[int]:
        """``lengths`` as numbers."""
        return list(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens that the longest sequence may have before ``block_table`` grows."""
        return self.block_table.shape[1] * PAGE

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens of all sequences together."""
        pages = -(-tokens // PAGE)
        if pages > len(self._owners):
            self._grow(pages)

    def add_sequences(self, count: int) -> None:
        """Begin ``count`` sequences without tokens, after those there are."""
        self._pages += [[] for _ in range(count)]
        self._lengths += [0] * count
        self._publish()

    def extend(self, counts: Sequence[int]) -> None:
        """Make room for ``counts[b]`` more tokens of sequence b, and count them.

        A page that is shared and will be written is copied first.
        """
        changed = False
        for row, count in enumerate(counts):
            pages, length = self._pages[row], self._lengths[row]
            if count and length % PAGE and self._owners[pages[length // PAGE]] > 1:
                self._part(row, length // PAGE)
                changed = True
            missing = -(-(length + count) // PAGE) - len(pages)
            if missing > 0:
                pages += [self._take() for _ in range(missing)]
                changed = True
            self._lengths[row] = length + count
        if changed:
            self._publish()
        else:  # most steps of a decoder
            self.lengths.copy_(torch.tensor(self._lengths))

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of sequence b from ``lengths[b]`` on."""
        for row, length in enumerate(lengths):
            pages = self._pages[row]
            for page in pages[-(-length // PAGE) :]:
                self._owners[page] -= 1
            del pages[-(-length // PAGE) :]
            self._lengths[row] = length
        self._publish()

    def reorder(self, rows: Sequence[int]) -> None:
        """Sequence b becomes what sequence rows[b] was; repeated ones share their pages."""
        kept = [list(self._pages[row]) for row in rows]
        for page in (page for pages in kept for page in pages):
            self._owners[page] += 1
        for page in (page for pages in self._pages for page in pages):
            self._owners[page] -= 1
        self._pages = kept
        self._lengths = [self._lengths[row] for row in rows]
        self._publish()

    def positions(self, seq: int) -> Tensor:
        """Int64[batch seq], of the newest ``seq`` tokens of each sequence."""
        return self.lengths[:, None] + torch.arange(-seq, 0, device=self.device)

    def write(self, layer: int, key: Tensor, value: Tensor, row: int | None = None) -> None:
        """Keep the newest tokens of all sequences, or of sequence ``row``.

        key, value: Float[batch kv_heads seq head_dim]; ``extend`` has counted them
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        ops.cache_write(
            key,
            value,
            **self._layers[layer],  # type: ignore[arg-type]
            cache_lengths=self.lengths[rows],
            block_table=self.block_table[rows],
        )

    def of(self, layer: int) -> dict[str, Any]:
        """Arguments of ``ops.attention_decode``."""
        return {
            **self._layers[layer],
            "cache_lengths": self.lengths,
            "block_table": self.block_table,
        }

    def _take(self) -> int:
        """A page that nobody has; more are made where there is none."""
        try:
            page = self._owners.index(0)
        except ValueError:
            page = len(self._owners)
            self._grow(2 * page)
        self._owners[page] = 1
        return page

    def _grow(self, pages: int) -> None:
        for layer in self._layers:
            for name, old in layer.items():
                new = old.new_zeros((pages, *old.shape[1:]))
                new[: old.shape[0]] = old
                layer[name] = new
        self._owners += [0] * (pages - len(self._owners))
        self.moves += 1

    def _part(self, row: int, index: int) -> None:
        """Give sequence ``row`` a page of its own in the place of one that it shares."""
        old = self._pages[row][index]
        new = self._take()
        for layer in self._layers:
            for tensor in layer.values():
                tensor[new] = tensor[old]
        self._owners[old] -= 1
        self._pages[row][index] = new

    def _publish(self) -> None:
        """Bring ``lengths`` and ``block_table`` up to date, in place where they have the room."""
        batch = len(self._pages)
        longest = max((len(pages) for pages in self._pages), default=0)
        if batch != self.lengths.shape[0] or longest > self.block_table.shape[1]:
            columns = max(self.block_table.shape[1], 1 << max(longest - 1, 1).bit_length())
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
            self.block_table = torch.zeros((batch, columns), dtype=torch.int32, device=self.device)
            self.moves += 1
        self.lengths.copy_(torch.tensor(self._lengths))
        columns = self.block_table.shape[1]
        table = [pages + [0] * (columns - len(pages)) for pages in self._pages]
        self.block_table.copy_(torch.tensor(table, dtype=torch.int32).view(batch, columns))
