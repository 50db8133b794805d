"""What encoder and decoder layers share: options beyond torch.nn, and calls of attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmos_fast.nn import plain
from llmos_fast.nn.attention import MultiheadAttention
from llmos_fast.nn.cache import LayerCache
from llmos_fast.nn.ffn import Activation, activation_name, is_gated
from llmos_fast.nn.masks import Given, Masks
from llmos_fast.nn.quant_linear import QuantLinear


def check_sizes(owner: str, d_model: int, nhead: int) -> None:
    """ValueError where the heads do not divide the features."""
    if nhead < 1 or d_model < 1 or d_model % nhead != 0:
        raise ValueError(
            f"{owner}: d_model must be a positive multiple of nhead = {nhead}, got {d_model}"
        )


def extend(
    layer: nn.Module,
    attention_options: dict[str, dict[str, Any]],
    activation: str | Activation,
    norm: str,
) -> None:
    """Turn a freshly made torch.nn layer's parts into llmos_fast's; same parameters by default.

    Args:
        layer: encoder or decoder layer.
        attention_options: for each attention module's name what MultiheadAttention.extend takes.
        activation: as given to the constructor.
        norm: "layer" or "rms".
    """
    for name, options in attention_options.items():
        module = getattr(layer, name)
        module.__class__ = MultiheadAttention
        module.extend(**options)
    linear1: nn.Linear = layer.linear1  # type: ignore[assignment]
    kind: dict[str, Any] = {"device": linear1.weight.device, "dtype": linear1.weight.dtype}
    if is_gated(activation):
        layer.linear_up = nn.Linear(
            linear1.in_features, linear1.out_features, bias=linear1.bias is not None, **kind
        )
    if norm not in ("layer", "rms"):
        raise ValueError(f'{type(layer).__name__}: norm must be "layer" or "rms", got {norm!r}')
    if norm == "rms":
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.LayerNorm):
                setattr(layer, name, nn.RMSNorm(module.normalized_shape, eps=module.eps, **kind))


def make_norm(
    norm: str, d_model: int, eps: float, bias: bool, device: Any, dtype: torch.dtype | None
) -> nn.Module:
    """The normalisation at the end of a stack."""
    if norm == "rms":
        return nn.RMSNorm(d_model, eps=eps, device=device, dtype=dtype)
    return nn.LayerNorm(d_model, eps=eps, bias=bias, device=device, dtype=dtype)


def resolve(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    given: Given,
    layout: str,
    cache: LayerCache | None = None,
) -> Masks:
    """The masks as MultiheadAttention wants them; as they came for a module of another kind."""
    if isinstance(module, MultiheadAttention):
        return module.resolve(query, key, given, layout, cache)
    return Masks(given)


def resolve_memory(
    module: nn.Module,
    query: Tensor,
    memory: Tensor | None,
    given: Given,
    layout: str,
    cache: LayerCache | None,
) -> Masks:
    """``resolve`` for attention to a memory, whose length the cache may know."""
    if not isinstance(module, MultiheadAttention):
        return Masks(given)
    if cache is not None and cache.memory is not None:
        return module.resolve_lengths(query, cache.memory[0].shape[2], given, layout)
    if memory is None:
        raise ValueError(
            "TransformerDecoderLayer: memory must be a tensor without a cache, got None"
        )
    return module.resolve(query, memory, given, layout)


def can_share_masks(layers: Iterable[nn.Module], layer_type: type[nn.Module]) -> bool:
    """True where masks resolved for one layer serve all, and layers need not be called."""
    return all(
        plain.is_plain(layer, layer_type)
        and all(
            isinstance(module, MultiheadAttention)
            for name, module in layer._modules.items()
            if name in ("self_attn", "multihead_attn")
        )
        for layer in layers
    )


def self_attention(
    module: nn.Module, x: Tensor, masks: Masks, layout: str, cache: LayerCache | None
) -> Tensor:
    """Attention of ``x`` to itself, by an ordinary call where somebody might watch."""
    if plain.is_plain(module, MultiheadAttention):
        return module.self_attention(x, masks, layout, cache)  # type: ignore[no-any-return,operator]
    return _call(module, x, x, masks.given, cache)


def cross_attention(
    module: nn.Module,
    x: Tensor,
    memory: Tensor | None,
    masks: Masks,
    layout: str,
    cache: LayerCache | None,
) -> Tensor:
    """Attention of ``x`` to ``memory`` likewise."""
    if plain.is_plain(module, MultiheadAttention):
        return module.cross_attention(x, memory, masks, layout, cache)  # type: ignore[no-any-return,operator]
    if memory is None:
        raise ValueError(
            "TransformerDecoderLayer: memory must be given to this attention, got None"
        )
    return _call(module, x, memory, masks.given, None)


def _call(
    module: nn.Module, query: Tensor, key: Tensor, given: Given, cache: LayerCache | None
) -> Tensor:
    arguments: dict[str, Any] = {
        "key_padding_mask": given.key_padding_mask,
        "need_weights": False,
        "attn_mask": given.attn_mask,
        "is_causal": given.is_causal,
    }
    if cache is not None:
        arguments["cache"] = cache
    return module(query, key, key, **arguments)[0]  # type: ignore[no-any-return]


_ROW_WISE = (*plain.LINEAR, QuantLinear, *plain.NORM, *plain.DROPOUT, MultiheadAttention)


def is_transparent(stack: nn.Module, layer_type: type[nn.Module]) -> bool:
    """True where nothing inside of ``stack`` can tell in which layout its layers run."""
    layers: Iterable[nn.Module] = stack.layers  # type: ignore[assignment]
    norm: nn.Module | None = stack.norm  # type: ignore[assignment]
    return (norm is None or plain.is_plain(norm, *plain.NORM)) and all(
        plain.is_plain(layer, layer_type)
        and activation_name(layer.activation) is not None  # type: ignore[arg-type]
        and all(
            _is_row_wise(module)
            for name, module in layer._modules.items()
            if module is not None and name != "activation"
        )
        for layer in layers
    )


def _is_row_wise(module: nn.Module) -> bool:
    """True for a plain module that treats every position alike, and attention without more keys."""
    if isinstance(module, MultiheadAttention) and module.extra_keys > 0:
        return False
    return plain.is_plain(module, *_ROW_WISE) and all(
        _is_row_wise(part) for part in module._modules.values() if part is not None
    )
