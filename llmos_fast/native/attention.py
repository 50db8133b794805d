"""attention on the CPU: csrc/cpu/attention.inl."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmos_fast.library import differentiable, register, second_order
from llmos_fast.native import attention_decode as decoding
from llmos_fast.native.common import (
    _C,
    address,
    contiguous,
    dropout_arguments,
    dtype_code,
    refusal,
    rows_contiguous,
)
from llmos_fast.reference import attention as definition

# up to here a pass over the keys for each query beats strips of 12 queries: with 1024 keys of 64,
# 8 queries took as long as blocks of 48 in fp32, and 1.15 times as long in bf16
_FEW_QUERIES = 4

# Options that both directions pass on, in the order of the registered ops.
_OPTIONS = (
    "str causal, int window_left, int window_right, float softcap, float dropout_p, Tensor? seed, "
    "float scale"
)
_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? key_lengths, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks"
)


def unsupported(
    *, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **_: object
) -> str | None:
    """Needs CPU tensors in fp32 or bf16."""
    return refusal(query, key, value)


def forward(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: str,
    key_lengths: Tensor | None,
    packed: Any,
    window: tuple[int, int],
    alibi_slopes: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    scale: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See llmos_fast.ops.attention."""
    scores_alone = mask is None and bias is None and packed is None and dropout_p == 0.0
    # one query that sees all keys may be taken for the last one, but not where distances count
    placed = causal == "bottom_right" or (alibi_slopes is None and window == (-1, -1))
    if scores_alone and placed and not return_lse and _decodes(query, key, value, sinks, causal):
        return decoding.forward(
            query=query,
            key_cache=key,
            value_cache=value,
            cache_lengths=key_lengths,
            block_table=None,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            key_scale=None,
            value_scale=None,
        )
    cu_q, cu_k = (None, None) if packed is None else (packed.cu_seqlens_q, packed.cu_seqlens_k)
    out, lse = _attention(
        query,
        key,
        value,
        mask,
        bias,
        key_lengths,
        cu_q,
        cu_k,
        alibi_slopes,
        sinks,
        causal,
        *window,
        softcap,
        dropout_p,
        seed,
        scale,
    )
    return (out, lse) if return_lse else out


def _decodes(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, causal: str) -> bool:
    """Whether the few queries are the last positions of the keys, and need no gradient."""
    seq_q = query.shape[2]
    if not 0 < seq_q <= _FEW_QUERIES or not (
        causal == "bottom_right" or (seq_q == 1 and causal == "")
    ):
        return False
    given = (query, key, value) if sinks is None else (query, key, value, sinks)
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


def _sequences(
    query: Tensor, key: Tensor, lengths: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: str,
) -> Tensor:  # fmt: skip
    """Int64[sequences 6]: the struct Sequence of csrc/cpu/kernels.h, one row each."""
    if cu_q is None or cu_k is None:
        batch, _, seq_q, _ = query.shape
        dense = _dense_sequences(batch, seq_q, key.shape[2], causal == "bottom_right")
        if lengths is None:
            return dense
        length_k = lengths.long().clamp(0, key.shape[2])
        shift = length_k - seq_q if causal == "bottom_right" else torch.zeros_like(length_k)
        return torch.cat((dense[:, :4], torch.stack((length_k, shift), dim=1)), dim=1)
    _check_cumulative("cu_seqlens_q", cu_q, query.shape[0])
    _check_cumulative("cu_seqlens_k", cu_k, key.shape[0])
    length_q, length_k = cu_q.diff().long(), cu_k.diff().long()
    zeros = torch.zeros_like(length_q)
    shift = length_k - length_q if causal == "bottom_right" else zeros
    return torch.stack(
        (zeros, cu_q[:-1].long(), length_q, cu_k[:-1].long(), length_k, shift), dim=1
    )


@lru_cache(maxsize=64)
def _dense_sequences(batch: int, seq_q: int, seq_k: int, bottom_right: bool) -> Tensor:
    """The table of a batch without lengths; read only, so it may serve every call of that shape."""
    shift = seq_k - seq_q if bottom_right else 0
    rows = [[b, 0, seq_q, 0, seq_k, shift] for b in range(batch)]
    return torch.tensor(rows, dtype=torch.int64).view(batch, 6)


def _check_cumulative(argument: str, lengths: Tensor, total: int) -> None:
    """The kernel reads and writes the rows that these name: they must exist."""
    values = lengths.tolist()
    if values[:1] != [0] or values != sorted(values) or values[-1] > total:
        rule = f"rise from 0 to at most {total}"
        raise ValueError(f"attention: {argument} must {rule}, got {values}")


def _strides(x: Tensor) -> tuple[int, ...]:
    """(batch, head, row, column) of [batch heads row column], or of packed [row heads column]."""
    if x.dim() == 4:
        return x.stride()
    row, head, column = x.stride()
    return (0, head, row, column)


def _broadcast_strides(x: Tensor | None, scores: tuple[int, ...]) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.expand(scores).stride()


def _scores_shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    return (*query.shape[:3], key.shape[2]) if query.dim() == 4 else (0, 0, 0, 0)


class _Call:
    """A call as the kernels take it; holds every tensor whose address it gave away."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
        lengths: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, alibi: Tensor | None,
        sinks: Tensor | None, causal: str, left: int, right: int, softcap: float, p: float,
        seed: Tensor | None, scale: float,
    ):  # fmt: skip
        query, key, value = (rows_contiguous(t) for t in (query, key, value))
        bias, alibi, sinks = (
            None if t is None else t.detach().float() for t in (bias, alibi, sinks)
        )
        alibi = contiguous(alibi)
        sinks = contiguous(sinks)
        sequences = _sequences(query, key, lengths, cu_q, cu_k, causal)
        self.tensors = (query, key, value, mask, bias, alibi, sinks, sequences, seed)
        dense = query.dim() == 4
        self.seq_q, self.heads_q = query.shape[2 if dense else 0], query.shape[1]
        self.query, self.key, self.value = query, key, value
        scores = _scores_shape(query, key)
        self.native = _C.AttentionCall(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            address(mask),
            address(bias),
            address(alibi),
            address(sinks),
            sequences.data_ptr(),
            sequences.shape[0],
            self.heads_q,
            key.shape[1],
            query.shape[-1],
            value.shape[-1],
            self.seq_q,
            _strides(query),
            _strides(key),
            _strides(value),
            _broadcast_strides(mask, scores),
            _broadcast_strides(bias, scores),
            alibi.shape[-1] if alibi is not None and alibi.dim() == 2 else 0,
            left,
            right,
            dtype_code(query.dtype),
            causal != "",
            scale,
            softcap,
            *dropout_arguments(seed, p),
        )

    def empty_out(self) -> Tensor:
        """Output with heads inside rows, the layout in which the output projection reads it."""
        if self.query.dim() == 3:
            return torch.empty(
                self.seq_q, self.heads_q, self.value.shape[-1], dtype=self.query.dtype
            )
        return _empty_rows_of_heads(self.query, self.value.shape[-1])

    def rows(self) -> tuple[int, ...]:
        """Shape of the row statistics."""
        if self.query.dim() == 3:
            return (self.heads_q, self.seq_q)
        return (self.query.shape[0], self.heads_q, self.seq_q)


def _empty_rows_of_heads(like: Tensor, head_dim: int) -> Tensor:
    """Uninitialised [batch heads seq head_dim], laid out [batch seq heads head_dim] in memory."""
    batch, heads, seq, _ = like.shape
    return like.new_empty(batch, seq, heads, head_dim).transpose(1, 2)


def _empty_like_input(x: Tensor) -> Tensor:
    return x.new_empty(x.shape) if x.dim() == 3 else _empty_rows_of_heads(x, x.shape[3])


def _forward_cpu(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    call = _Call(query, key, value, *rest)
    out = call.empty_out()
    lse = torch.empty(call.rows(), dtype=torch.float32)
    if query.dim() == 3:
        # rows that belong to no sequence, and sequences without keys
        out.zero_()
        lse.fill_(-torch.inf)
    _C.attention_forward(call.native, out.data_ptr(), _strides(out), lse.data_ptr())
    return out, lse


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    if query.dim() == 3:
        total, heads = query.shape[:2]
        out = query.new_empty(total, heads, value.shape[-1])
        return out, query.new_empty(heads, total, dtype=torch.float32)
    dense = _empty_rows_of_heads(query, value.shape[-1])
    return dense, query.new_empty(query.shape[:3], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, options = inputs[:10], inputs[10:]
    ctx.options = options[:5] + options[6:]
    ctx.save_for_backward(*tensors, options[5], *output)


def _backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed, out, lse = ctx.saved_tensors
    causal, left, right, softcap, p, scale = ctx.options
    if torch.is_grad_enabled():
        gradients = _differentiable_backward(ctx, d_out, d_lse)
    else:
        d_out = torch.zeros_like(out) if d_out is None else d_out
        need_bias, need_sinks = ctx.needs_input_grad[4], ctx.needs_input_grad[9]
        d_query, d_key, d_value, d_bias, d_sinks = _attention_backward(
            *tensors, causal, left, right, softcap, p, seed, scale,
            out, lse, d_out, d_lse, need_bias, need_sinks,
        )  # fmt: skip
        bias, sinks = tensors[4], tensors[9]
        gradients = {
            "query": d_query,
            "key": d_key,
            "value": d_value,
            "bias": d_bias.sum_to_size(bias.shape).to(bias.dtype) if need_bias else None,
            "sinks": d_sinks.to(sinks.dtype) if need_sinks else None,
        }
    needs = ctx.needs_input_grad
    return (
        gradients["query"] if needs[0] else None,
        gradients["key"] if needs[1] else None,
        gradients["value"] if needs[2] else None,
        None,
        gradients["bias"] if needs[4] else None,
        *(None,) * 4,
        gradients["sinks"] if needs[9] else None,
        *(None,) * 7,
    )


def _differentiable_backward(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None
) -> dict[str, Tensor | None]:
    from llmos_fast.ops.attention import PackedLengths

    query, key, value, mask, bias, lengths, cu_q, cu_k, alibi, sinks, seed, _, _ = ctx.saved_tensors
    causal, left, right, softcap, p, scale = ctx.options
    tensors = {"query": query, "key": key, "value": value, "bias": bias, "sinks": sinks}
    rest = {
        "mask": mask,
        "causal": causal,
        "key_lengths": lengths,
        "packed": None if cu_q is None else PackedLengths(cu_q, cu_k, 0, 0),
        "window": (left, right),
        "alibi_slopes": alibi,
        "softcap": softcap,
        "dropout_p": p,
        "seed": seed,
        "scale": scale,
        "return_lse": True,
    }
    return second_order(definition, tensors, rest, (d_out, d_lse))


def _backward_cpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None,
    lengths: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, alibi: Tensor | None,
    sinks: Tensor | None, causal: str, left: int, right: int, softcap: float, p: float,
    seed: Tensor | None, scale: float, out: Tensor, lse: Tensor, d_out: Tensor,
    d_lse: Tensor | None, need_bias: bool, need_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(
        query, key, value, mask, bias, lengths, cu_q, cu_k, alibi, sinks, causal, left, right,
        softcap, p, seed, scale,
    )  # fmt: skip
    out, d_out = rows_contiguous(out), rows_contiguous(d_out)
    row_lse, d_sinks = lse, torch.zeros(0)
    if sinks is not None:
        sink = sinks.float().view(-1, 1)
        row_lse = torch.logaddexp(lse, sink).masked_fill(lse == -torch.inf, -torch.inf)
        if need_sinks:
            probability = torch.exp(sink - row_lse).masked_fill(lse == -torch.inf, 0.0)
            delta = (d_out.float() * out.float()).sum(-1)
            delta, heads = (delta, 1) if query.dim() == 4 else (delta.transpose(0, 1), 0)
            d_sinks = -(probability * delta).transpose(0, heads).flatten(1).sum(1)
    if d_lse is not None:
        # lse counts the keys only: with a sink its probabilities are larger than those of out
        d_lse = d_lse * torch.exp(row_lse - lse).masked_fill(lse == -torch.inf, 0.0)
        d_lse = d_lse.contiguous()
    d_query, d_key, d_value = (_empty_like_input(t) for t in (call.query, call.key, call.value))
    if query.dim() == 3 or lengths is not None:
        # rows outside of every sequence are not visited
        d_query.zero_()
        d_key.zero_()
        d_value.zero_()
    scores = _scores_shape(query, key)
    # tiles that a mask, a length or a window excludes are skipped
    d_bias = torch.zeros(scores if need_bias else (0, 0, 0, 0))
    row_lse = row_lse.contiguous()
    _C.attention_backward(
        call.native,
        out.data_ptr(),
        _strides(out),
        d_out.data_ptr(),
        _strides(d_out),
        row_lse.data_ptr(),
        address(d_lse),
        d_query.data_ptr(),
        d_key.data_ptr(),
        d_value.data_ptr(),
        _strides(d_query),
        _strides(d_key),
        _strides(d_value),
        address(d_bias) if need_bias else 0,
        scores[3],
    )
    return d_query, d_key, d_value, d_bias, d_sinks


def _backward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_bias, need_sinks = rest[-2:]
    scores = _scores_shape(query, key) if need_bias else (0, 0, 0, 0)
    heads_q = query.shape[1]
    return (
        *(_empty_like_input(t) for t in (query, key, value)),
        query.new_empty(scores, dtype=torch.float32),
        query.new_empty(heads_q if need_sinks else 0, dtype=torch.float32),
    )


_attention = differentiable(
    f"attention({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward_cpu,
    _forward_fake,
    _setup_context,
    _backward,
)
_attention_backward = register(
    f"attention_backward({_TENSORS}, {_OPTIONS}, Tensor out, Tensor lse, Tensor d_out, "
    "Tensor? d_lse, bool need_bias, bool need_sinks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_cpu,
    _backward_fake,
)
