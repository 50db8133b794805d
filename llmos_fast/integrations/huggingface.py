"""Hugging Face transformers: ``attn_implementation="llmos_fast"``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmos_fast import ops

NAME = "llmos_fast"


def register() -> None:
    """Make "llmos_fast" an attention implementation of Hugging Face transformers.

    Afterwards ``from_pretrained(..., attn_implementation="llmos_fast")`` and
    ``model.set_attn_implementation("llmos_fast")`` work for every model whose attention goes
    through transformers' ``AttentionInterface``. Masks are those of "sdpa": boolean, and left out
    where a call is plainly causal or full. Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or too old to have the two interfaces.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "llmos_fast.integrations.huggingface.register: transformers with AttentionInterface "
            'and AttentionMaskInterface is needed: pip install "transformers>=5"'
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **_others: object,  # models hand on what any implementation might read: position_ids, ...
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it; see llmos_fast.ops.attention for the mathematics.

    ``attention_mask`` says everything about who attends to whom where it is given: causality,
    window, padding, packing. Without it, ``is_causal``, ``sliding_window`` and the packed lengths
    do.

    Args:
        module: the model's attention layer; its ``is_causal`` counts where the argument is None.
        query: Float[batch heads_q seq_q head_dim].
        key: Float[batch heads_kv seq_k head_dim], not repeated for grouped queries.
        value: Float[batch heads_kv seq_k head_dim_v].
        attention_mask: broadcastable to [batch heads_q seq_q seq_k]; Bool, True = attend, or
            Float, added to the scores.
        dropout: chance that a probability is dropped.
        scaling: of the scores; default head_dim ** -0.5.
        is_causal: hides later keys. One query stands at the last key (a cache that has grown);
            several stand at the first keys (a prefill, maybe into a larger static cache).
        sliding_window: keys at this distance or farther are hidden.
        softcap: tanh limit of the scores.
        s_aux: Float[heads_q], the sinks of gpt-oss.
        sinks: must be None; these vary by query (Inkling 2), which the op does not have.
        position_bias: Float, broadcastable like the mask, added to the scores (T5).
        cu_seq_lens_q: Int32[sequences + 1], where each sequence starts among the batch * seq_q
            queries; with the next three, packed sequences. Aligned at their last positions, as in
            flash-attention.
        cu_seq_lens_k: likewise for the keys.
        max_length_q: longest sequence of queries.
        max_length_k: likewise for the keys.

    Returns:
        out: Float[batch seq_q heads_q head_dim_v], contiguous; rows that may attend to nothing
        are 0. None: attention weights are never computed.

    Raises:
        ValueError: as llmos_fast.ops.attention, and where ``sinks`` is given.
    """
    if sinks is not None:
        raise ValueError(f"{NAME}: sinks must be None (per-head sinks are s_aux), got a tensor")
    mask, bias = _mask_and_bias(attention_mask, position_bias)
    causal, window, packed = "", None, None
    if attention_mask is None:
        if sliding_window is not None:
            window = (sliding_window - 1, sliding_window - 1)
        packed = _packed_lengths(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        if getattr(module, "is_causal", True) if is_causal is None else is_causal:
            at_the_end = query.shape[2] == 1 or packed is not None
            causal = "bottom_right" if at_the_end else "top_left"
    batch, _, seq_q, _ = query.shape
    if packed is not None:
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = ops.attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal or False,
        cu_seqlens=packed,
        window=window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        scale=scaling,
    )
    assert isinstance(out, Tensor)  # without the log-sum-exp
    out = out.transpose(1, 2) if packed is None else out.unflatten(0, (batch, seq_q))
    return out.contiguous(), None


def _mask_and_bias(
    attention_mask: Tensor | None, position_bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which keys may be attended to, and what is added to their scores."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask, position_bias
    return None, attention_mask if position_bias is None else attention_mask + position_bias


def _packed_lengths(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
) -> tuple[Tensor, Tensor, int, int] | None:
    """The four together, as llmos_fast.ops.attention takes them; None where one is missing."""
    if cu_seqlens_q is None or cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
        return None
    return cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
