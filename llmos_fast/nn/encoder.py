"""The encoder: self-attention and feed-forward layers, and their stack."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmos_fast.nn import layer as parts
from llmos_fast.nn import plain
from llmos_fast.nn.cache import Cache, LayerCache, with_cached_padding
from llmos_fast.nn.ffn import Activation, activation_function, feed_forward
from llmos_fast.nn.layout import BATCH_FIRST, PACKED, SEQ_FIRST, layout_of, seq_dim
from llmos_fast.nn.masks import Given, Masks, attn_mask_kind, hidden_positions, inspect_padding
from llmos_fast.nn.packing import Packing, make_packing
from llmos_fast.nn.positions import make_positions


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on the kernels of llmos_fast.

    Constructor, ``forward``, sub-modules, initialisation and ``state_dict`` are torch.nn's. It
    computes the same in training and evaluation, and a query that may attend to nothing gives
    finite values.

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
        rotary: rotate queries and keys by their positions; a number is the base, True is 10000.
        norm: "layer" or "rms".
        window: (left, right), how far a query sees; -1 leaves a side open.

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
        options = {"num_kv_heads": num_kv_heads, "rotary": rotary, "window": window}
        parts.extend(self, {"self_attn": options}, activation, norm)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Pass ``src`` through the layer.

        Args:
            src: Float[batch seq d_model], [seq batch d_model] or [seq d_model].
            src_mask: [seq seq] or [batch*nhead seq seq]; bool, True = hidden, or floating point,
                added to the scores. With a cache: [seq cached+seq].
            src_key_padding_mask: [batch seq] (or [seq]) likewise, in any combination of dtypes.
            is_causal: hide the positions after each query; takes the place of ``src_mask``.
            cache: keys and values of earlier positions, to which the new ones are added.

        Returns:
            Float of the shape of ``src``.

        Raises:
            ValueError: naming class, argument, rule and value.
        """
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        attention = self.self_attn
        layout = layout_of(src, attention.batch_first)
        given = Given(src_mask, src_key_padding_mask, is_causal)
        masks = parts.resolve(attention, src, src, given, layout, cache)
        return self.run(src, masks, layout, cache)

    def run(self, x: Tensor, masks: Masks, layout: str, cache: LayerCache | None = None) -> Tensor:
        """``forward`` with masks resolved, in any layout."""
        attention = self.self_attn
        if self.norm_first:
            attended = parts.self_attention(
                attention, plain.norm(self.norm1, x), masks, layout, cache
            )
            normed, x = plain.dropout_add_norm(self.dropout1, self.norm2, attended, x)
            return plain.dropout_add(self.dropout2, feed_forward(self, normed), x)
        attended = parts.self_attention(attention, x, masks, layout, cache)
        x, _ = plain.dropout_add_norm(self.dropout1, self.norm1, attended, x)
        x, _ = plain.dropout_add_norm(self.dropout2, self.norm2, feed_forward(self, x), x)
        return x


class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder on the kernels of llmos_fast; with a cache, a causal decoder.

    Padding: where ``use_nested_tensor`` is true (torch.nn's own conditions: post-norm,
    ``batch_first``, an even number of heads, ReLU or GELU, biases, ``enable_nested_tensor``) and a
    ``src_key_padding_mask`` comes without ``mask``, the positions that it hides are skipped, and
    are zeros in the output: always, in training as in evaluation, and never cut off. Everywhere
    else their outputs are computed, as torch.nn does.

    Args:
        encoder_layer: is copied ``num_layers`` times.
        num_layers: of the stack.
        norm: applied at the end.
        enable_nested_tensor: False computes the outputs of hidden positions in every case.
        mask_check: accepted for compatibility: every mask is checked.
        positions: None, "sinusoidal" or "learned", added to ``src``.
        max_length: of learned positions.

    Raises:
        ValueError: naming class, argument, rule and value.
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        positions: str | None = None,
        max_length: int | None = None,
    ):
        with warnings.catch_warnings():
            # that a layer has no nested-tensor path says nothing about this stack's speed
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
            super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)
        if positions is not None:
            owner = type(self).__name__
            self.positions = make_positions(owner, positions, max_length, encoder_layer)

    def new_cache(self, batch_size: int, max_length: int = 256) -> Cache:
        """An empty cache for ``forward``; its room doubles when ``max_length`` is used up."""
        return Cache(len(self.layers), batch_size, max_length)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """Pass ``src`` through all layers.

        Args:
            src: Float[batch seq d_model], [seq batch d_model] or [seq d_model].
            mask: [seq seq] or [batch*nhead seq seq]; bool, True = hidden, or floating point, added
                to the scores. With a cache: [seq cached+seq].
            src_key_padding_mask: [batch seq] (or [seq]) likewise, in any combination of dtypes;
                with a cache bool, for the new positions, the earlier ones are remembered.
            is_causal: hide the positions after each query; takes the place of ``mask``. None
                finds out from ``mask``.
            cache: from ``new_cache``; ``src`` then holds the positions after those in it, and no
                position attends to a later one.

        Returns:
            Float of the shape of ``src``.

        Raises:
            ValueError: naming class, argument, rule and value.
        """
        if src.is_nested:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        skip_padding = self.use_nested_tensor and mask is None and cache is None
        given = Given(mask, src_key_padding_mask, bool(is_causal))
        return self.run(src, given, cache, skip_padding=skip_padding)

    def run(
        self, src: Tensor, given: Given, cache: Cache | None = None, *, skip_padding: bool
    ) -> Tensor:
        """``forward``, where the caller says whether hidden positions may come out as zeros."""
        layout = layout_of(src, self.layers[0].self_attn.batch_first)
        padding_mask = given.key_padding_mask
        skip_padding = skip_padding and padding_mask is not None and src.dim() == 3
        x, positions = src, self._modules.get("positions")
        if positions is not None:
            x = positions(x, 0 if cache is None else cache.length, seq_dim(layout))
        if cache is not None:
            given = with_cached_padding(given, src, layout, cache)
        free = (layout == SEQ_FIRST or skip_padding) and parts.is_transparent(
            self, TransformerEncoderLayer
        )
        # heads lie in memory as [batch seq ..]: another layout costs every layer a copy
        inner = BATCH_FIRST if layout == SEQ_FIRST and free else layout
        if inner != layout:
            x = x.transpose(0, 1).contiguous()
        packing = make_packing(given, x) if skip_padding and free else None
        if packing is not None:
            x = self._run_packed(x, packing, given)
        else:
            x = self._finish(self._run_layers(x, given, inner, cache))
            if skip_padding:
                x = _without_hidden(x, padding_mask, inner)
        return x if inner == layout else x.transpose(0, 1).contiguous()

    def _run_packed(self, x: Tensor, packing: Packing, given: Given) -> Tensor:
        masks = packing.masks(given)
        x = packing.pack(x)
        for layer in self.layers:
            x = layer.run(x, masks, PACKED)
        return packing.unpack(self._finish(x))

    def _run_layers(self, x: Tensor, given: Given, layout: str, cache: Cache | None) -> Tensor:
        caches = [None] * len(self.layers) if cache is None else cache.layers
        if parts.can_share_masks(self.layers, TransformerEncoderLayer):
            attention = self.layers[0].self_attn
            masks = parts.resolve(attention, x, x, given, layout, caches[0])
            for layer, layer_cache in zip(self.layers, caches, strict=True):
                x = layer.run(x, masks, layout, layer_cache)
            return x
        mask, padding_mask, is_causal = given
        is_causal = is_causal or (mask is not None and attn_mask_kind(mask) == "causal")
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            options = {} if layer_cache is None else {"cache": layer_cache}
            x = layer(
                x,
                src_mask=mask,
                is_causal=is_causal,
                src_key_padding_mask=padding_mask,
                **options,
            )
        return x

    def _finish(self, x: Tensor) -> Tensor:
        return x if self.norm is None else plain.norm(self.norm, x)


def _without_hidden(x: Tensor, key_padding_mask: Tensor | None, layout: str) -> Tensor:
    """``x`` with zeros at the positions that the mask hides."""
    assert key_padding_mask is not None
    if inspect_padding(key_padding_mask).kind == "none":
        return x
    hidden = hidden_positions(key_padding_mask)
    hidden = hidden if layout == BATCH_FIRST else hidden.transpose(0, 1)
    return x.masked_fill(hidden.unsqueeze(-1), 0.0)
