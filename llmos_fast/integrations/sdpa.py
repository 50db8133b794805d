"""torch's registry of flash attentions: F.scaled_dot_product_attention on llmos_fast's kernels.

The functions here have the signatures and results of aten's operators of the same names, as torch
calls them under its CUDA key, below autograd: out, the log-sum-exp, and a state of the random bits
that the backward operator is given back. Dense aten tensors are [batch seq heads head_dim] for
``_flash_attention_*`` and [batch heads seq head_dim] for ``_scaled_dot_product_*``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.attention
from torch import Tensor

from llmos_fast.dispatch import registered
from llmos_fast.dropout import draw_seed
from llmos_fast.ops import check

NAME = "llmos_fast"

_Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor]


def register() -> None:
    """Offer the Triton kernels of ``ops.attention`` to torch's registry of flash attentions.

    Two steps, because torch leaves the choice to its users::

        llmos_fast.integrations.sdpa.register()
        torch.nn.attention.activate_flash_attention_impl("llmos_fast")

    From then on what torch sends to flash attention on CUDA runs on llmos_fast's kernels:
    ``F.scaled_dot_product_attention`` and ``nn.MultiheadAttention`` in fp16 and bf16 without a
    mask, ``varlen_attn``; with gradients and dropout.
    ``torch.nn.attention.restore_flash_attention_impl()`` gives torch's own back.

    Refused with a ValueError: pages (``block_table``), ``seqused_k``, ALiBi, the debug mask, and
    windows that end after the query where sequences of queries and keys differ in length (that the
    lengths are equal is read from the device, once per call with such a window).

    Not run on a GPU yet unless the README's status table says so.

    Raises:
        RuntimeError: this torch has no such registry, or the kernels cannot be imported.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(
            "llmos_fast.integrations.sdpa.register: needs a torch that has "
            f"torch.nn.attention.register_flash_attention_impl, got torch {torch.__version__}"
        )
    triton = next(i for i in registered()["attention"] if i.name == "triton")
    if triton.module is None:
        raise RuntimeError(f"llmos_fast.integrations.sdpa.register: attention {triton.missing}")
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=_Activation)


class _Activation:
    """aten's operators are ours from its creation until torch's registry calls ``remove``."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        for name, function in OPERATORS.items():
            if hasattr(torch.ops.aten, name):  # older versions of torch do not have all
                self.library.impl(name, function, "CUDA")

    def remove(self) -> None:
        # torch drops the registrations with the object
        self.library = None


class _Options(NamedTuple):
    """What aten's forward and backward operators both say beside the tensors."""

    causal: str
    window: tuple[int, int]
    dropout_p: float
    scale: float | None
    lengths: tuple[Tensor | None, Tensor | None, int, int] = (None, None, 0, 0)

    def arguments(
        self, query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None
    ) -> tuple[Any, ...]:
        """Arguments of llmos_fast::attention_triton; dense tensors are [batch heads seq dim]."""
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        mask = bias = key_lengths = alibi_slopes = sinks = None
        return (
            *(query, key, value, mask, bias, key_lengths, *self.lengths, alibi_slopes, sinks),
            *(self.causal, *self.window, 0.0, self.dropout_p, seed, scale),
        )


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,  # 1 asks for sums that do not depend on the batch, as ours are
) -> _Forward:
    _refuse("_flash_attention_forward", "return_debug_mask", return_debug_mask or None)
    _refuse("_flash_attention_forward", "seqused_k", seqused_k)
    _refuse("_flash_attention_forward", "alibi_slopes", alibi_slopes)
    _refuse("_flash_attention_forward", "block_table", block_table)
    lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
    window = (window_size_left, window_size_right)
    options = _flash_options(query, key, lengths, dropout_p, is_causal, scale, window)
    tensors = (query, key, value)
    if cum_seq_q is not None:
        return _forward(options, *tensors)
    out, *others = _forward(options, *(t.transpose(1, 2) for t in tensors))
    return (out.transpose(1, 2), *others)  # type: ignore[return-value]


def _flash_attention_forward_no_dropout_inplace(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    """The arguments of ``_flash_attention_forward``, written to ``out``; the log-sum-exp."""
    result, lse, *_ = _flash_attention_forward(query, key, value, *arguments, **options)
    out.copy_(result)
    return lse


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> _Gradients:
    lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
    window = (window_size_left, window_size_right)
    options = _flash_options(query, key, lengths, dropout_p, is_causal, scale, window)
    tensors = (query, key, value, out, grad_out)
    if cum_seq_q is not None:
        return _backward(options, logsumexp, rng_state, *tensors)
    dense = (t.transpose(1, 2) for t in tensors)
    gradients = _backward(options, logsumexp, rng_state, *dense)
    return tuple(g.transpose(1, 2) for g in gradients)  # type: ignore[return-value]


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    _refuse("_scaled_dot_product_flash_attention", "return_debug_mask", return_debug_mask or None)
    options = _Options("top_left" if is_causal else "", (-1, -1), dropout_p, scale)
    out, lse, rng_state, unused, debug_mask = _forward(options, query, key, value)
    longest = (query.shape[2], key.shape[2])
    return out, lse, None, None, *longest, rng_state, unused, debug_mask


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> _Gradients:
    options = _Options("top_left" if is_causal else "", (-1, -1), dropout_p, scale)
    return _backward(options, logsumexp, philox_seed, query, key, value, out, grad_out)


OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        _flash_attention_forward,
        _flash_attention_forward_no_dropout_inplace,
        _flash_attention_backward,
        _scaled_dot_product_flash_attention,
        _scaled_dot_product_flash_attention_backward,
    )
}


def _refuse(op: str, argument: str, value: object) -> None:
    rule = f"be left out with {NAME}'s kernels"
    check.require(value is None, op, argument, rule, type(value).__name__)


def _flash_options(
    query: Tensor,
    key: Tensor,
    lengths: tuple[Tensor | None, Tensor | None, int, int],
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: tuple[int | None, int | None],
) -> _Options:
    """Flash-attention aligns queries and keys at their ends, ops.attention only causal ones."""
    left, right = (-1 if side is None else side for side in window)
    causal = "bottom_right" if is_causal or right == 0 else ""
    cum_seq_q, cum_seq_k, _, _ = lengths
    rule = "be given where cum_seq_q is, and only there"
    both = (cum_seq_q is None) == (cum_seq_k is None)
    check.require(both, "_flash_attention_forward", "cum_seq_k", rule, type(cum_seq_k).__name__)
    if not causal and (left, right) != (-1, -1):
        equal = (
            query.shape[1] == key.shape[1]
            if cum_seq_q is None or cum_seq_k is None
            else cum_seq_q.data_ptr() == cum_seq_k.data_ptr() or torch.equal(cum_seq_q, cum_seq_k)
        )
        rule = "end at the query (right = 0) where queries and keys differ in length"
        check.require(equal, "_flash_attention_forward", "window_size", rule, (left, right))
    packed = (None, None, 0, 0) if cum_seq_q is None else lengths
    return _Options(causal, (left, right), dropout_p, scale, packed)


def _forward(options: _Options, query: Tensor, key: Tensor, value: Tensor) -> _Forward:
    """Results of ``_flash_attention_forward``; dense tensors are [batch heads seq head_dim]."""
    seed = draw_seed(options.dropout_p, query.device)
    arguments = options.arguments(query, key, value, seed)
    out, lse = torch.ops.llmos_fast.attention_triton(*arguments)
    rng_state = torch.zeros(2, dtype=torch.int64, device=query.device)
    if seed is not None:
        rng_state[0] = seed
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    out = _with_strides_like(out, query)
    return out, lse, rng_state.view(torch.uint64), unused, query.new_empty(0)


def _backward(
    options: _Options,
    logsumexp: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
) -> _Gradients:
    """Gradients of query, key and value in the layout of ``_forward``."""
    seed = None if options.dropout_p == 0.0 else rng_state.view(torch.int64)[0]
    arguments = options.arguments(query, key, value, seed)
    results = (out, logsumexp, grad_out, None)
    d_query, d_key, d_value, _, _ = torch.ops.llmos_fast.attention_triton_backward(
        *arguments, *results, need_bias=False, need_sinks=False
    )
    gradients = zip((d_query, d_key, d_value), (query, key, value), strict=True)
    return tuple(_with_strides_like(g, x) for g, x in gradients)  # type: ignore[return-value]


def _with_strides_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in memory as torch's own kernel would leave it: compiled graphs rely on the strides."""
    assert x.shape == like.shape  # flash attention has one head_dim
    strides = torch.empty_like(like, device="meta").stride()
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
