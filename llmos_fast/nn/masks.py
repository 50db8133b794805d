"""From torch.nn's mask arguments to those of ops.attention.

torch.nn hides what is True, or adds floating-point masks to the scores; ops.attention attends to
what is True, and takes causal masks and key lengths by name, which costs less than any tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

Result = TypeVar("Result")
_attn_masks = WeakTensorKeyDictionary()
_paddings = WeakTensorKeyDictionary()


class Given(NamedTuple):
    """The mask arguments as the caller gave them."""

    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    is_causal: bool


class Packed(NamedTuple):
    """Sequences one behind the other, without padding.

    ``cu_seqlens`` is what ops.attention takes; ``positions`` is Int64[total], each token's place in
    its sequence.
    """

    cu_seqlens: tuple[Tensor, Tensor, int, int]
    positions: Tensor


class Masks(NamedTuple):
    """What ops.attention is told about who may attend to what; ``given`` is where it came from."""

    given: Given
    mask: Tensor | None = None
    bias: Tensor | None = None
    causal: bool | str = False
    key_lengths: Tensor | None = None
    packed: Packed | None = None


class Padding(NamedTuple):
    """What a key padding mask holds; no tensor of it shares memory with the mask.

    Attributes:
        kind: "none" where no key is hidden; "prefix" where every sequence is a prefix followed by
            padding only; "scattered" for any other choice of keys; "bias" for a floating-point
            mask with more in it than 0 and -inf.
        lengths: Int64[batch], for "prefix".
        counts: the same on the host.
    """

    kind: str
    lengths: Tensor | None = None
    counts: tuple[int, ...] = ()


def resolve(
    owner: str,
    given: Given,
    *,
    batch: int | None,
    heads: int,
    seq_q: int,
    seq_k: int,
    cached: bool = False,
) -> Masks:
    """Choose the cheapest arguments of ops.attention that mean the same as torch.nn's.

    Args:
        owner: class name for error messages.
        given: attn_mask [seq_q seq_k] or [batch*heads seq_q seq_k], key_padding_mask
            [batch seq_k], each bool (True = hidden) or floating point (added to the scores), in
            any combination; is_causal hides the keys after the query and takes the place of
            attn_mask.
        batch: None where the input has no batch dimension.
        heads: query heads.
        seq_q: queries.
        seq_k: keys, with those in the cache.
        cached: queries are the last of the keys and may attend to no key after their own.

    Raises:
        ValueError: naming class, argument, rule and value.
    """
    attn_mask, key_padding_mask, is_causal = given
    if attn_mask is not None:
        _check_attn_mask(owner, attn_mask, 1 if batch is None else batch, heads, seq_q, seq_k)
    if key_padding_mask is not None:
        expected = (seq_k,) if batch is None else (batch, seq_k)
        _check(owner, "key_padding_mask", key_padding_mask, (expected,))
    kind = "open" if attn_mask is None or is_causal else attn_mask_kind(attn_mask)
    causal: bool | str = "bottom_right" if cached else is_causal or kind == "causal"
    mask = bias = lengths = None
    if attn_mask is not None and kind == "other":
        view = attn_mask if attn_mask.dim() == 2 else attn_mask.view(-1, heads, seq_q, seq_k)
        mask, bias = (~view, None) if attn_mask.dtype == torch.bool else (None, view)
    if key_padding_mask is not None:
        rows = _rows(key_padding_mask)[:, None, None]
        kind, lengths, _ = inspect_padding(key_padding_mask)
        # with a cache, queries are counted from the last key, and lengths would move that end
        if kind == "scattered" or (kind == "prefix" and cached):
            visible = ~hidden_positions(rows)
            mask, lengths = visible if mask is None else mask & visible, None
        elif kind == "bias":
            bias = rows if bias is None else bias + rows
    return Masks(given, mask, bias, causal, lengths)


def attn_mask_kind(attn_mask: Tensor) -> str:
    """Tell masks that need no tensor.

    Returns:
        "open" for a mask that hides and adds nothing; "causal" for one that hides exactly what lies
        after each query, [seq seq]; "other" for the rest, and where nobody may look.
    """
    if attn_mask.dim() != 2 or not _can_read(attn_mask):
        return "other"
    return _once(_attn_masks, attn_mask, _read_attn_mask)


def inspect_padding(key_padding_mask: Tensor) -> Padding:
    """Read a mask, once; under a compiler, which cannot, take it as it comes."""
    if _can_read(key_padding_mask):
        return _once(_paddings, key_padding_mask, _read_padding)
    return Padding("scattered" if key_padding_mask.dtype == torch.bool else "bias")


def hidden_positions(key_padding_mask: Tensor) -> Tensor:
    """Bool of its shape: what the mask hides for certain."""
    if key_padding_mask.dtype == torch.bool:
        return key_padding_mask
    return key_padding_mask == -torch.inf


def visible_pairs(
    masks: Masks, window: tuple[int, int] | None, query: Tensor, seq_k: int
) -> Tensor:
    """Bool broadcastable to [batch heads seq_q seq_k], True = attended to; without ``bias``."""
    seq_q = query.shape[2]
    shift = seq_k - seq_q if masks.causal == "bottom_right" else 0
    key_position = torch.arange(seq_k, device=query.device)
    query_position = torch.arange(seq_q, device=query.device)[:, None] + shift
    distance = key_position - query_position
    left, right = window or (-1, -1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if masks.causal:
        visible = distance <= 0
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    if masks.key_lengths is not None:
        visible = visible & (key_position < masks.key_lengths.view(-1, 1, 1, 1))
    return visible if masks.mask is None else visible & masks.mask


def with_extra_keys(
    masks: Masks, window: tuple[int, int] | None, query: Tensor, seq_k: int, extra: int
) -> Masks:
    """The same masks for ``extra`` more keys at the end, which every query may attend to."""
    visible = F.pad(visible_pairs(masks, window, query, seq_k), (0, extra), value=True)
    bias = None if masks.bias is None else F.pad(masks.bias, (0, extra))
    return Masks(masks.given, visible, bias)


def _check_attn_mask(
    owner: str, attn_mask: Tensor, batch: int, heads: int, seq_q: int, seq_k: int
) -> None:
    allowed = ((seq_q, seq_k), (batch * heads, seq_q, seq_k))
    _check(owner, "attn_mask", attn_mask, allowed)


def _check(owner: str, argument: str, mask: Tensor, allowed: tuple[tuple[int, ...], ...]) -> None:
    if tuple(mask.shape) not in allowed:
        shapes = " or ".join(str(shape) for shape in allowed)
        raise ValueError(f"{owner}: {argument} must have shape {shapes}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{owner}: {argument} must be bool or floating point, got {mask.dtype}")


def _read_attn_mask(attn_mask: Tensor) -> str:
    if not attn_mask.any():
        return "open"
    hidden_value = True if attn_mask.dtype == torch.bool else -torch.inf
    seq_q, seq_k = attn_mask.shape
    # most masks that are not causal are told by one element
    if seq_q != seq_k or attn_mask[0, -1].item() != hidden_value:
        return "other"
    expected = torch.full_like(attn_mask, hidden_value).triu_(1)
    return "causal" if torch.equal(attn_mask, expected) else "other"


def _read_padding(key_padding_mask: Tensor) -> Padding:
    rows = _rows(key_padding_mask)
    hidden = hidden_positions(rows)
    if rows.is_floating_point() and not torch.equal(hidden, rows != 0):
        return Padding("bias")
    seq_k = rows.shape[1]
    lengths = seq_k - hidden.sum(1)
    counts = tuple(lengths.tolist())
    if all(count == seq_k for count in counts):
        return Padding("none")
    beyond = torch.arange(seq_k, device=rows.device) >= lengths[:, None]
    return (
        Padding("prefix", lengths, counts) if torch.equal(hidden, beyond) else Padding("scattered")
    )


def _rows(key_padding_mask: Tensor) -> Tensor:
    """[batch seq_k], with a batch of 1 for a mask without one."""
    return key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask.unsqueeze(0)


def _can_read(mask: Tensor) -> bool:
    """Values may be looked at: nobody traces, nobody differentiates with respect to them."""
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and type(mask) is Tensor
        and not mask.requires_grad
        and not mask.is_meta
    )


def _once(
    memory: WeakTensorKeyDictionary, mask: Tensor, read: Callable[[Tensor], Result]
) -> Result:
    """``read(mask)``, remembered until the mask changes or dies: reading waits for a GPU."""
    if mask.is_inference():  # has no version
        return read(mask)
    version, result = memory.get(mask, (-1, None))
    if version != mask._version:
        result = read(mask)
        memory[mask] = (mask._version, result)
    return result  # type: ignore[no-any-return]
