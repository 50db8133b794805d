"""Attention that also returns its probabilities, as torch.nn does where it is asked for weights."""

from __future__ import annotations

from torch import Tensor

from llmos_fast.dispatch import implementations, select
from llmos_fast.ops import check
from llmos_fast.ops.attention import validated

implementations("attention_weights", "native", "triton")

_OP = "attention_weights"


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool | str = False,
    key_lengths: Tensor | None = None,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    average_heads: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``ops.attention``, and the probabilities that its values are summed with.

        weights = dropout(softmax(s over the keys that may be attended to));  out = weights value

    One call draws the dropout of both results, so that they agree, and the bits are those that
    ``ops.attention`` draws from the same seed. A row that may attend to nothing gives 0 in both.
    The triton implementation never holds the probabilities of single heads where their mean is
    asked for, except for the gradient of ``weights``, which the definition computes.

    Args:
        query: Float[batch heads_q seq_q head_dim], any strides.
        key: Float[batch heads_kv seq_k head_dim].
        value: Float[batch heads_kv seq_k head_dim_v].
        mask: as in ops.attention.
        bias: as in ops.attention.
        causal: as in ops.attention.
        key_lengths: as in ops.attention.
        window: as in ops.attention.
        alibi_slopes: as in ops.attention.
        softcap: as in ops.attention.
        sinks: as in ops.attention; what a sink takes is missing from the sum of a row's weights.
        dropout_p: as in ops.attention.
        scale: as in ops.attention.
        average_heads: return the mean of the weights over the heads.
        impl: "auto", or the name of an implementation, which is then forced.

    Returns:
        (out, weights) in query's dtype: Float[batch heads_q seq_q head_dim_v] and
        Float[batch heads_q seq_q seq_k], with ``average_heads`` Float[batch seq_q seq_k].

    Gradients: query, key, value, bias, sinks, from both results. Autocast as in ops.attention.

    Raises:
        ValueError: naming op, argument, rule and value.
    """
    call = validated(
        _OP,
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        key_lengths=key_lengths,
        cu_seqlens=None,
        window=window,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        scale=scale,
    )
    if average_heads:
        heads_q = query.shape[1]
        check.require(heads_q > 0, _OP, "heads of query", "be 1 or more for a mean", heads_q)
    return select(_OP, impl, **call, average_heads=average_heads)  # type: ignore[no-any-return]
