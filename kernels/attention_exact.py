"""Attention whose numbers are all whole, small enough for 16 bits to hold them exactly.

So that a wrong term shows whatever the rounding: every query attends to the keys of its own class,
all others get a probability of exactly 0, and every tile of 32 keys holds each class once.

- Forward, all keys of a class have the same value, so that is the output, however many they are
  and whatever they weigh. Later keys weigh more: accumulators are rescaled on the way.
- Backward, the kernels are told such sums and outputs that p is 1 or 2, and dp - delta 1 or 2 too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

HEADS_Q, HEADS_KV = 4, 2

_GROUP = HEADS_Q // HEADS_KV
_CLASS_BITS = 5
# a score of another class is less by twice as much, or more: 2^-253 is 0 in fp32
_APART = 128.0


class Problem(NamedTuple):
    """Inputs and results by name, whole numbers in Float32[heads seq ...], on the CPU.

    ``lse`` [heads_q seq] is an input of the backward kernels, and no whole number; ``weight``
    [heads_q seq], its exponential, is a result of the forward kernel.
    """

    inputs: dict[str, Tensor]
    results: dict[str, Tensor]
    scale: float


def forward_problem(seq: int, head_dim: int, causal: bool) -> Problem:
    """For query, key and value: out and weight."""
    with torch.device("cpu"):
        seed = torch.Generator().manual_seed(0)
        inputs, attends = _inputs(seq, head_dim, 4, seed)
        weights = attends * 2.0 ** _of_queries(inputs.pop("level")).mT
        weights = weights.tril() if causal else weights
        results = {"out": _of_queries(inputs["value"]), "weight": weights.sum(-1)}
    # so scores are in base 2: fp32 rounds the product with log2(e) to 1
    return Problem(inputs, results, scale=math.log(2.0))


def backward_problem(seq: int, head_dim: int, causal: bool) -> Problem:
    """For query, key, value, out, d_out and lse: d_query, d_key and d_value."""
    with torch.device("cpu"):
        seed = torch.Generator().manual_seed(0)
        inputs, attends = _inputs(seq, head_dim, 1, seed)
        del inputs["level"]
        # scores that count are 0: p = exp(-lse)
        row_p = torch.randint(1, 3, (HEADS_Q, seq, 1), generator=seed).float()
        p = attends.tril() * row_p if causal else attends * row_p
        d_out = _integers(HEADS_Q, seq, head_dim, largest=3, seed=seed)
        d_out[..., 0] = 1.0
        # dp - delta = d_out (value - out)
        difference = _integers(HEADS_Q, seq, 1, largest=2, seed=seed)
        out = _of_queries(inputs["value"])
        out[..., :1] -= difference
        ds = p * difference
        results = {
            "d_query": ds @ _of_queries(inputs["key"]),
            "d_key": _sum_of_group(ds.mT @ inputs["query"]),
            "d_value": _sum_of_group(p.mT @ d_out),
        }
        inputs |= {"out": out, "d_out": d_out, "lse": -row_p[..., 0].log()}
    return Problem(inputs, results, scale=1.0)


def _inputs(
    seq: int, head_dim: int, levels: int, seed: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """(query, key, value and level, which keys each query attends to).

    The score of a key is its level, from 0 on to ``levels`` - 1, or less by 256 and more.
    """
    classes = 2**_CLASS_BITS
    shuffled = torch.rand(HEADS_KV, -(-seq // classes), classes, generator=seed)
    of_class = shuffled.argsort(-1).flatten(1)[:, :seq]
    bits = (of_class[..., None] >> torch.arange(_CLASS_BITS)) % 2 * 2.0 - 1.0
    level = (torch.arange(seq) * levels // seq).float().expand(HEADS_KV, seq)[..., None]
    one = torch.ones_like(level)
    # the score of these columns is x y - x y; they are there for the gradients
    columns = (head_dim - _CLASS_BITS - 3) // 2
    x, y = (_integers(h, seq, columns, largest=2, seed=seed) for h in (HEADS_Q, HEADS_KV))
    code = torch.cat([bits * _APART, one * _APART, one * _APART, one], -1)
    values = _integers(HEADS_KV, classes, head_dim, largest=7, seed=seed)
    inputs = {
        "query": torch.cat([_of_queries(code), x, x], -1),
        "key": torch.cat([bits, one * -2, one * -3, level, y, -y], -1),
        "value": values.gather(1, of_class[..., None].expand(-1, -1, head_dim)),
        "level": level,
    }
    return inputs, _of_queries(of_class[:, :, None] == of_class[:, None, :]).float()


def _integers(*shape: int, largest: int, seed: torch.Generator) -> Tensor:
    """Positive and negative, none is 0."""
    sign = torch.randint(2, shape, generator=seed) * 2 - 1
    return (sign * torch.randint(1, largest + 1, shape, generator=seed)).float()


def _of_queries(x: Tensor) -> Tensor:
    return x.repeat_interleave(_GROUP, 0)


def _sum_of_group(x: Tensor) -> Tensor:
    return x.view(HEADS_KV, _GROUP, *x.shape[1:]).sum(1)
