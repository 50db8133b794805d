"""Padded batches without their padding: what every row-wise op can skip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast.nn.masks import Given, Masks, Packed, Padding, attn_mask_kind, inspect_padding

# Packing copies the activations twice; below this share of padding that costs more than it saves.
WORTHWHILE = 0.1


class Packing:
    """Moves [batch seq features] to [total features], without padding, and back.

    Args:
        padding: of kind "prefix".
        shape: (batch, seq) of the padded activations.
        causal: hide what lies after each query.
    """

    def __init__(self, padding: Padding, shape: tuple[int, int], causal: bool):
        assert padding.lengths is not None
        self.shape = shape
        self.causal = causal
        lengths = padding.lengths
        # repeat_interleave with a known size does not wait for the device
        total = sum(padding.counts)
        sequence = torch.repeat_interleave(lengths, output_size=total)
        cumulative = F.pad(lengths.cumsum(0), (1, 0))
        offset = torch.arange(total, device=lengths.device)
        positions = offset - cumulative[sequence]
        self._index = sequence * shape[1] + positions
        longest = max(padding.counts)
        cu_seqlens = cumulative.to(torch.int32)
        self._packed = Packed((cu_seqlens, cu_seqlens, longest, longest), positions)

    def masks(self, given: Given) -> Masks:
        """What attention is told: packed sequences need no padding mask."""
        return Masks(given, causal=self.causal, packed=self._packed)

    def pack(self, x: Tensor) -> Tensor:
        """Float[batch seq features] -> Float[total features]."""
        return x.flatten(0, 1).index_select(0, self._index)

    def unpack(self, x: Tensor) -> Tensor:
        """Float[total features] -> Float[batch seq features], zeros at the padding."""
        batch, seq = self.shape
        padded = x.new_zeros(batch * seq, x.shape[-1])
        return padded.index_copy(0, self._index, x).view(batch, seq, x.shape[-1])


def make_packing(given: Given, x: Tensor) -> Packing | None:
    """A packing for ``x``, Float[batch seq features]; None where masks forbid it or it loses."""
    attn_mask, key_padding_mask, is_causal = given
    kind = "open" if attn_mask is None or is_causal else attn_mask_kind(attn_mask)
    if key_padding_mask is None or kind == "other":
        return None
    padding = inspect_padding(key_padding_mask)
    batch, seq = x.shape[:2]
    total = sum(padding.counts)
    if padding.kind != "prefix" or not 0 < total <= (1 - WORTHWHILE) * batch * seq:
        return None
    return Packing(padding, (batch, seq), is_causal or kind == "causal")
