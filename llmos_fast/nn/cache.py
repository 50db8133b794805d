"""Keys and values of the positions that were already decoded."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.nn.layout import batch_and_length
from llmos_fast.nn.masks import Given


class LayerCache:
    """What one layer keeps: keys and values of its own that grow, and those of a memory.

    Args:
        max_length: positions to make room for at first; the room doubles when it is used up.
    """

    def __init__(self, max_length: int = 256):
        if max_length < 1:
            raise ValueError(f"LayerCache: max_length must be positive, got {max_length}")
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None
        self._capacity = max_length
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the next positions; return all of them.

        Args:
            key: Float[batch heads_kv seq head_dim].
            value: Float[batch heads_kv seq head_dim].

        Returns:
            Views of the cache, Float[batch heads_kv length + seq head_dim] each.

        Raises:
            ValueError: where a gradient would have to flow through the cache, or where the batch,
                the heads or the dtype changed since the first call.
        """
        _refuse_gradients(key, value)
        end = self.length + key.shape[2]
        keys, values = self._reserve(key, end)
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def keep_memory(self, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values of an encoder's output, [batch heads_kv seq_k head_dim]."""
        _refuse_gradients(key, value)
        self.memory = (key, value)

    def reset(self) -> None:
        """Forget every position and the memory; the room stays."""
        self.length = 0
        self.memory = None

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was; ``index`` is Int64[new batch]."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, index)
            self._values = self._values.index_select(0, index)
        if self.memory is not None:
            key, value = self.memory
            self.memory = (key.index_select(0, index), value.index_select(0, index))

    def _reserve(self, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Room for ``length`` positions of keys and values that look like ``like``."""
        keys, values = self._keys, self._values
        if keys is None or values is None or self.length == 0:
            if keys is None or values is None or not self._fits(keys, like, length):
                while self._capacity < length:
                    self._capacity *= 2
                shape = (*like.shape[:2], self._capacity, like.shape[3])
                keys, values = like.new_empty(shape), like.new_empty(shape)
        elif not self._fits(keys, like, 0):
            raise ValueError(
                "LayerCache: key must keep batch, heads, head_dim and dtype of the cache, "
                f"{tuple(keys.shape)} {keys.dtype}, got {tuple(like.shape)} {like.dtype}"
            )
        elif length > keys.shape[2]:
            while self._capacity < length:
                self._capacity *= 2
            keys, values = self._grown(keys), self._grown(values)
        self._keys, self._values = keys, values
        return keys, values

    def _fits(self, keys: Tensor, like: Tensor, length: int) -> bool:
        return (
            keys.shape[:2] == like.shape[:2]
            and keys.shape[3] == like.shape[3]
            and keys.dtype == like.dtype
            and keys.device == like.device
            and keys.shape[2] >= length
        )

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_empty((*old.shape[:2], self._capacity, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


class Cache:
    """What a stack keeps while it decodes; made by its ``new_cache``.

    Attributes:
        layers: one LayerCache for each layer.

    Args:
        num_layers: of the stack.
        batch_size: sequences that are decoded together.
        max_length: positions to make room for at first; the room doubles when it is used up.
    """

    def __init__(self, num_layers: int, batch_size: int, max_length: int = 256):
        if batch_size < 1:
            raise ValueError(f"Cache: batch_size must be positive, got {batch_size}")
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]
        self.batch_size = batch_size
        self._hidden: Tensor | None = None
        self._memory: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions decoded so far."""
        return self.layers[0].length if self.layers else 0

    def reset(self) -> None:
        """Forget every position, padding and the memory; the room stays."""
        for layer in self.layers:
            layer.reset()
        self._hidden = None
        self._memory = None

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, as beam search needs it.

        The next call takes memory=None and goes on with the rearranged memory, or a memory in the
        new order, which is projected again.

        Args:
            index: Int64[new batch size].
        """
        for layer in self.layers:
            layer.reorder(index)
        if self._hidden is not None:
            self._hidden = self._hidden.index_select(0, index)
        self._memory = None
        self.batch_size = index.numel()

    def hide(self, key_padding_mask: Tensor | None, batch: int, seq: int) -> Tensor | None:
        """Remember which of the ``seq`` new positions are padding.

        Args:
            key_padding_mask: Bool[batch seq] or Bool[batch length + seq], True = padding; or None.
            batch: sequences in this call.
            seq: new positions in this call.

        Returns:
            Bool[batch length + seq] over cached and new positions, or None where none is padding.

        Raises:
            ValueError: naming class, argument, rule and value.
        """
        if batch != self.batch_size:
            raise ValueError(f"Cache: batch size must be {self.batch_size}, got {batch}")
        length = self.length
        if key_padding_mask is None:
            if self._hidden is not None:
                self._hidden = torch.nn.functional.pad(self._hidden[:, :length], (0, seq))
            return self._hidden
        expected = ((batch, seq), (batch, length + seq))
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape not in expected:
            raise ValueError(
                f"Cache: key_padding_mask must be bool of shape {expected[0]} or {expected[1]}, "
                f"got {key_padding_mask.dtype} {tuple(key_padding_mask.shape)}"
            )
        if key_padding_mask.shape[1] == seq and length > 0:
            earlier = self._hidden
            if earlier is None:
                earlier = key_padding_mask.new_zeros(batch, length)
            key_padding_mask = torch.cat((earlier[:, :length], key_padding_mask), dim=1)
        self._hidden = key_padding_mask
        return key_padding_mask

    def hold_memory(self, memory: Tensor | None) -> None:
        """Forget the layers' projections of the memory where ``memory`` is another tensor.

        None means the memory of the calls before; ValueError where there was none.
        """
        if memory is None:
            if not self.layers or self.layers[0].memory is None:
                raise ValueError("Cache: memory must be given in the first call, got None")
        elif memory is not self._memory:
            for layer in self.layers:
                layer.memory = None
            self._memory = memory


def with_cached_padding(given: Given, x: Tensor, layout: str, cache: Cache) -> Given:
    """The masks of a call that goes on from ``cache``: padding counts the cached positions too."""
    batch, seq = batch_and_length(x, layout)
    if batch is None:
        raise ValueError(f"Cache: input must have a batch dimension, got {tuple(x.shape)}")
    return given._replace(key_padding_mask=cache.hide(given.key_padding_mask, batch, seq))


def _refuse_gradients(key: Tensor, value: Tensor) -> None:
    if key.requires_grad or value.requires_grad:
        raise ValueError(
            "LayerCache: key and value must need no gradient (decode under torch.no_grad()), "
            "got tensors that require one"
        )
