"""The whole encoder-decoder model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmos_fast.nn import layer as parts
from llmos_fast.nn import plain
from llmos_fast.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from llmos_fast.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from llmos_fast.nn.ffn import Activation
from llmos_fast.nn.masks import Given


class Transformer(nn.Transformer):
    """torch.nn.Transformer (Vaswani et al. 2017) on the kernels of llmos_fast.

    Constructor, ``forward``, sub-modules, initialisation and ``state_dict`` are torch.nn's.

    Args:
        d_model: features.
        nhead: attention heads, a divisor of ``d_model``.
        num_encoder_layers: of the encoder.
        num_decoder_layers: of the decoder.
        dim_feedforward: hidden features of the feed-forward networks.
        dropout: in training.
        activation: a callable or a name, see TransformerEncoderLayer.
        custom_encoder: takes the place of the encoder.
        custom_decoder: takes the place of the decoder.
        layer_norm_eps: of the normalisations.
        batch_first: inputs are [batch seq d_model] instead of [seq batch d_model].
        norm_first: normalise before attention and feed-forward instead of after.
        bias: of projections and LayerNorm.
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: heads of keys and values, a divisor of ``nhead``.
        rotary: rotate queries and keys of self-attentions by their positions; a number is the
            base, True is 10000.
        norm: "layer" or "rms".
        window: (left, right), how far self-attentions see; -1 leaves a side open.
        positions: None, "sinusoidal" or "learned", added to ``src`` and ``tgt``.
        max_length: of learned positions.

    Raises:
        ValueError: naming class, argument, rule and value.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Activation = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
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
        positions: str | None = None,
        max_length: int | None = None,
    ):
        # nn.Transformer's constructor would draw the weights of torch.nn's layers first
        nn.Module.__init__(self)
        arguments = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        options: dict[str, Any] = {
            "num_kv_heads": num_kv_heads,
            "rotary": rotary,
            "norm": norm,
            "window": window,
        }
        stack: dict[str, Any] = {"positions": positions, "max_length": max_length}
        end = (norm, d_model, layer_norm_eps, bias, device, dtype)
        if custom_encoder is not None:
            self.encoder = custom_encoder
        else:
            encoder_layer = TransformerEncoderLayer(*arguments, **options)
            # the decoder may be let to see padding: then its outputs must be computed
            self.encoder = TransformerEncoder(
                encoder_layer, num_encoder_layers, parts.make_norm(*end), False, **stack
            )
        if custom_decoder is not None:
            self.decoder = custom_decoder
        else:
            decoder_layer = TransformerDecoderLayer(*arguments, **options)
            self.decoder = TransformerDecoder(
                decoder_layer, num_decoder_layers, parts.make_norm(*end), **stack
            )
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead
        self.batch_first = batch_first

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Encode ``src`` and decode ``tgt``.

        Args:
            src: Float[batch seq_k d_model], [seq_k batch d_model] or [seq_k d_model].
            tgt: Float[batch seq_q d_model] likewise.
            src_mask: [seq_k seq_k] or [batch*nhead seq_k seq_k]; bool, True = hidden, or floating
                point, added to the scores.
            tgt_mask: [seq_q seq_q] or [batch*nhead seq_q seq_q] likewise.
            memory_mask: [seq_q seq_k] or [batch*nhead seq_q seq_k] likewise.
            src_key_padding_mask: [batch seq_k] (or [seq_k]), in any combination of dtypes.
            tgt_key_padding_mask: [batch seq_q] (or [seq_q]) likewise.
            memory_key_padding_mask: [batch seq_k] (or [seq_k]) likewise; where it is
                ``src_key_padding_mask`` itself, the encoder skips the hidden positions.
            src_is_causal: hide later positions; takes the place of ``src_mask``. None finds out.
            tgt_is_causal: likewise for ``tgt_mask``.
            memory_is_causal: likewise for ``memory_mask``.

        Returns:
            Float of the shape of ``tgt``.

        Raises:
            ValueError: naming class, argument, rule and value.
        """
        self._check_inputs(src, tgt)
        given = Given(src_mask, src_key_padding_mask, bool(src_is_causal))
        # what no query of the decoder sees need not be computed; what it sees must be
        unseen = memory_key_padding_mask is src_key_padding_mask and plain.is_plain(
            self.decoder, TransformerDecoder
        )
        if plain.is_plain(self.encoder, TransformerEncoder) and not src.is_nested:
            memory = self.encoder.run(src, given, skip_padding=unseen)
        else:
            memory = self.encoder(
                src,
                mask=src_mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=src_is_causal,
            )
        return self.decoder(  # type: ignore[no-any-return]
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )

    def _check_inputs(self, src: Tensor, tgt: Tensor) -> None:
        owner = type(self).__name__
        for argument, x in (("src", src), ("tgt", tgt)):
            if x.size(-1) != self.d_model:
                rule = f"end with d_model = {self.d_model}"
                raise ValueError(f"{owner}: {argument} must {rule}, got {tuple(x.shape)}")
        batch_dim = 0 if self.batch_first else 1
        if src.dim() == 3 and src.size(batch_dim) != tgt.size(batch_dim):
            rule = f"have the batch size of src, {src.size(batch_dim)}"
            raise ValueError(f"{owner}: tgt must {rule}, got {tgt.size(batch_dim)}")
