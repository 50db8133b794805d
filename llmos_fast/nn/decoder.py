"""The decoder: self-attention, attention to a memory and feed-forward layers, and their stack."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmos_fast.nn import layer as parts
from llmos_fast.nn import plain
from llmos_fast.nn.cache import Cache, LayerCache, with_cached_padding
from llmos_fast.nn.ffn import Activation, activation_function, feed_forward
from llmos_fast.nn.layout import BATCH_FIRST, SEQ_FIRST, layout_of, seq_dim
from llmos_fast.nn.masks import Given, Masks, attn_mask_kind
from llmos_fast.nn.positions import make_positions


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on the kernels of llmos_fast.

    Constructor, ``forward``, sub-modules, initialisation and ``state_dict`` are torch.nn's; a query
    that may attend to nothing gives finite values.

    Args:
        d_model: features.
        nhead: attention heads, a divisor of ``d_model``.
        dim_feedforward: hidden features of the feed-forward network.
        dropout: in training.
        activation: a callable, "relu", "gelu", "gelu_tanh", "silu", "relu2", or gated: "swiglu",
            "geglu", "reglu", with one more projection, ``linear_up``.
        layer_norm_eps: of the normalisations.
        batch_first: inputs are [batch seq d_model] instead of [seq batch d_model].
        norm_first: normalise before attention and feed-forward instead of after.
        bias: of projections and LayerNorm.
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: heads of keys and values, a divisor of ``nhead``.
        rotary: rotate queries and keys of the self-attention by their positions; a number is the
            base, True is 10000.
        norm: "layer" or "rms".
        window: (left, right), how far the self-attention sees; -1 leaves a side open.

    Raises:
        ValueError: naming class, argument, rule and value.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        rotary: bool | float = False,
        norm: str = "layer",
        window: tuple[int, int] | None = None,
    ):
        owner = type(self).__name__
        parts.check_sizes(owner, d_model, nhead)
        function = activation_function(owner, activation)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, function, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        own: dict[str, Any] = {"num_kv_heads": num_kv_heads, "rotary": rotary, "window": window}
        options = {"self_attn": own, "multihead_attn": {"num_kv_heads": num_kv_heads}}
        parts.extend(self, options, activation, norm)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Pass ``tgt`` through the layer.

        Args:
            tgt: Float[batch seq_q d_model], [seq_q batch d_model] or [seq_q d_model].
            memory: Float[batch seq_k d_model] likewise; with a cache that holds a memory it is not
                read, and may be None.
            tgt_mask: [seq_q seq_q] or [batch*nhead seq_q seq_q]; bool, True = hidden, or floating
                point, added to the scores. With a cache: [seq_q cached+seq_q].
            memory_mask: [seq_q seq_k] or [batch*nhead seq_q seq_k] likewise.
            tgt_key_padding_mask: [batch seq_q] (or [seq_q]), in any combination of dtypes.
            memory_key_padding_mask: [batch seq_k] (or [seq_k]) likewise.
            tgt_is_causal: hide the positions after each query; takes the place of ``tgt_mask``.
            memory_is_causal: likewise for ``memory_mask``.
            cache: keys and values of earlier positions, to which the new ones are added, and those
                of the memory.

        Returns:
            Float of the shape of ``tgt``.

        Raises:
            ValueError: naming class, argument, rule and value.
        """
        layout = layout_of(tgt, self.self_attn.batch_first)
        own = Given(tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        tgt_masks = parts.resolve(self.self_attn, tgt, tgt, own, layout, cache)
        other = Given(memory_mask, memory_key_padding_mask, memory_is_causal)
        memory_masks = parts.resolve_memory(self.multihead_attn, tgt, memory, other, layout, cache)
        return self.run(tgt, memory, tgt_masks, memory_masks, layout, cache)

    def run(
        self,
        x: Tensor,
        memory: Tensor | None,
        tgt_masks: Masks,
        memory_masks: Masks,
        layout: str,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """``forward`` with masks resolved, in any layout."""
        own, other = self.self_attn, self.multihead_attn
        normed = plain.norm(self.norm1, x) if self.norm_first else x
        attended = parts.self_attention(own, normed, tgt_masks, layout, cache)
        if self.norm_first:
            normed, x = plain.dropout_add_norm(self.dropout1, self.norm2, attended, x)
            attended = parts.cross_attention(other, normed, memory, memory_masks, layout, cache)
            normed, x = plain.dropout_add_norm(self.dropout2, self.norm3, attended, x)
            return plain.dropout_add(self.dropout3, feed_forward(self, normed), x)
        x, _ = plain.dropout_add_norm(self.dropout1, self.norm1, attended, x)
        attended = parts.cross_attention(other, x, memory, memory_masks, layout, cache)
        x, _ = plain.dropout_add_norm(self.dropout2, self.norm2, attended, x)
        x, _ = plain.dropout_add_norm(self.dropout3, self.norm3, feed_forward(self, x), x)
        return x


class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder on the kernels of llmos_fast.

    Args:
        decoder_layer: is copied ``num_layers`` times.
        num_layers: of the stack.
        norm: applied at the end.
        positions: None, "sinusoidal" or "learned", added to ``tgt``.
        max_length: of learned positions.

    Raises:
        ValueError: naming class, argument, rule and value.
    """

    def __init__(
        self,
        decoder_layer: nn.TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        positions: str | None = None,
        max_length: int | None = None,
    ):
        super().__init__(decoder_layer, num_layers, norm)
        if positions is not None:
            owner = type(self).__name__
            self.positions = make_positions(owner, positions, max_length, decoder_layer)

    def new_cache(self, batch_size: int, max_length: int = 256) -> Cache:
        """An empty cache for ``forward``; its room doubles when ``max_length`` is used up."""
        return Cache(len(self.layers), batch_size, max_length)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """Pass ``tgt`` through all layers.

        Args:
            tgt: Float[batch seq_q d_model], [seq_q batch d_model] or [seq_q d_model].
            memory: Float[batch seq_k d_model] likewise. With a cache, the memory of the call
                before is not projected again, and may be given as None.
            tgt_mask: [seq_q seq_q] or [batch*nhead seq_q seq_q]; bool, True = hidden, or floating
                point, added to the scores. With a cache: [seq_q cached+seq_q].
            memory_mask: [seq_q seq_k] or [batch*nhead seq_q seq_k] likewise.
            tgt_key_padding_mask: [batch seq_q] (or [seq_q]), in any combination of dtypes; with a
                cache bool, for the new positions, the earlier ones are remembered.
            memory_key_padding_mask: [batch seq_k] (or [seq_k]) likewise; given in every call.
            tgt_is_causal: hide the positions after each query; takes the place of ``tgt_mask``.
                None finds out from ``tgt_mask``.
            memory_is_causal: likewise for ``memory_mask``.
            cache: from ``new_cache``; ``tgt`` then holds the positions after those in it, and no
                position attends to a later one.

        Returns:
            Float of the shape of ``tgt``.

        Raises:
            ValueError: naming class, argument, rule and value.
        """
        layout = layout_of(tgt, self.layers[0].self_attn.batch_first)
        own = Given(tgt_mask, tgt_key_padding_mask, bool(tgt_is_causal))
        other = Given(memory_mask, memory_key_padding_mask, memory_is_causal)
        x, positions = tgt, self._modules.get("positions")
        if positions is not None:
            x = positions(x, 0 if cache is None else cache.length, seq_dim(layout))
        if cache is not None:
            own = with_cached_padding(own, tgt, layout, cache)
            cache.hold_memory(memory)
        # heads lie in memory as [batch seq ..]: another layout costs every layer a copy
        if layout == SEQ_FIRST and parts.is_transparent(self, TransformerDecoderLayer):
            x = x.transpose(0, 1).contiguous()
            if memory is not None:
                memory = memory.transpose(0, 1).contiguous()
            x = self._finish(self._run_layers(x, memory, own, other, BATCH_FIRST, cache))
            return x.transpose(0, 1).contiguous()
        return self._finish(self._run_layers(x, memory, own, other, layout, cache))

    def _run_layers(
        self,
        x: Tensor,
        memory: Tensor | None,
        own: Given,
        other: Given,
        layout: str,
        cache: Cache | None,
    ) -> Tensor:
        caches = [None] * len(self.layers) if cache is None else cache.layers
        if parts.can_share_masks(self.layers, TransformerDecoderLayer):
            first, first_cache = self.layers[0], caches[0]
            own_masks = parts.resolve(first.self_attn, x, x, own, layout, first_cache)
            memory_masks = parts.resolve_memory(
                first.multihead_attn,
                x,
                memory,
                other,
                layout,
                first_cache,
            )
            for layer, layer_cache in zip(self.layers, caches, strict=True):
                x = layer.run(x, memory, own_masks, memory_masks, layout, layer_cache)
            return x
        is_causal = own.is_causal or (
            own.attn_mask is not None and attn_mask_kind(own.attn_mask) == "causal"
        )
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            options = {} if layer_cache is None else {"cache": layer_cache}
            x = layer(
                x,
                memory,
                tgt_mask=own.attn_mask,
                memory_mask=other.attn_mask,
                tgt_key_padding_mask=own.key_padding_mask,
                memory_key_padding_mask=other.key_padding_mask,
                tgt_is_causal=is_causal,
                memory_is_causal=other.is_causal,
                **options,
            )
        return x

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.norm is None else plain.norm(self.norm, x)
