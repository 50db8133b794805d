"""A call of attention on a GPU: its inputs, how it is run, and what its results must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmos_fast import ops, reference
from llmos_fast.testing import assert_close_to_truth, native_precision

from .attention_cases import DEVICE, Attend, Case
from .cuda import Run

# the float64 scores that a check holds at once
CHECKED_SCORES = 2**24


class Call(NamedTuple):
    """Inputs of a call on the GPU; ``d_out`` is None where no gradients are taken."""

    query: Tensor
    key: Tensor
    value: Tensor
    d_out: Tensor | None

    def runner(self, attend: Attend, *leaves: Tensor) -> Run:
        """Without arguments: forward, or forward and the gradients of q, k, v and ``leaves``."""
        query, key, value, d_out = self
        if d_out is None:
            return lambda: attend(query, key, value)
        wanted = (query, key, value, *leaves)
        return lambda: torch.autograd.grad(attend(query, key, value), wanted, d_out)

    def backward_runner(self, attend: Attend, *leaves: Tensor) -> Run:
        """Only the gradients, of a forward that is run here."""
        out = attend(*self[:3])
        wanted = (*self[:3], *leaves)
        return lambda: torch.autograd.grad(out, wanted, self.d_out, retain_graph=True)

    def results(self, attend: Attend) -> list[Tensor]:
        """[out], or [out, d_query, d_key, d_value]; dropout draws from the same seed every time."""
        torch.manual_seed(0)
        out = attend(*self[:3])
        if self.d_out is None:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, self[:3], self.d_out)]

    def to(self, dtype: torch.dtype) -> Call:
        """A copy in ``dtype``."""
        train = self.d_out is not None
        query, key, value = (t.detach().to(dtype).requires_grad_(train) for t in self[:3])
        return Call(query, key, value, None if self.d_out is None else self.d_out.to(dtype))

    @property
    def bytes(self) -> int:
        """What must at least be moved: in backward everything is read again, gradients are new."""
        once = self.query.nbytes + self.key.nbytes + self.value.nbytes
        once += self.query.nbytes // self.query.shape[-1] * self.value.shape[-1]
        return once * (1 if self.d_out is None else 3)


def make_call(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype, train: bool) -> Call:
    """Normal inputs of these three sizes."""
    query, key, value = (
        torch.randn(size, dtype=dtype, device=DEVICE, requires_grad=train) for size in sizes
    )
    d_out = torch.randn(*sizes[0][:-1], sizes[2][-1], dtype=dtype, device=DEVICE)
    return Call(query, key, value, d_out if train else None)


def call_of(case: Case, train: bool) -> Call:
    """Normal inputs of the case's sizes."""
    keys = (case.batch, case.heads_kv, case.seq)
    query = (case.batch, case.heads, case.seq, case.head_dim)
    return make_call([query, (*keys, case.head_dim), (*keys, case.head_dim_v)], case.dtype, train)


def compare_results(results: list[Tensor], small: Call, attend: Attend, reduction: int) -> None:
    """Raise where ``results`` leave the error budget of ``attend``, a reference, on ``small``."""
    truth = small.to(torch.float64).results(attend)
    with native_precision():
        eager = small.results(attend)
    names = ("out", "d_query", "d_key", "d_value")
    for name, result, low, true in zip(names, results, eager, truth, strict=False):
        assert_close_to_truth(result, low, true, reduction=reduction, name=name)


def check_last_rows(call: Call, case: Case, options: dict[str, Any]) -> None:
    """The whole call, of which the last rows of the first key head are compared.

    The last rows of a causal call are one that is aligned at the bottom right. They alone get a
    gradient, so that those of the keys can be compared too. Dropout's bits depend on seq_q.
    """
    group = case.heads // case.heads_kv
    rows = min(case.seq, CHECKED_SCORES // (group * case.seq))
    if "dropout_p" in options:
        rows = case.seq
    if call.d_out is not None:
        d_out = torch.zeros_like(call.d_out)
        d_out[:, :, -rows:] = call.d_out[:, :, -rows:]
        call = call._replace(d_out=d_out)
    whole = call.results(
        lambda *qkv: ops.attention(*qkv, causal=case.causal, impl="triton", **options)
    )

    def of_group(t: Tensor) -> Tensor:
        return t[:1, :group, -rows:]

    small = Call(
        of_group(call.query),
        call.key[:1, :1],
        call.value[:1, :1],
        None if call.d_out is None else of_group(call.d_out),
    ).to(case.dtype)
    shrunk = {
        "bias": lambda t: of_group(t.detach()),
        "mask": lambda t: t[-rows:],
        "key_lengths": lambda t: t[:1],
        "alibi_slopes": lambda t: t[:group],
        "sinks": lambda t: t[:group],
    }
    options = {n: shrunk[n](v) if n in shrunk else v for n, v in options.items()}
    alignment = "bottom_right" if case.causal and rows < case.seq else case.causal
    results = [of_group(whole[0])]
    if call.d_out is not None:
        results += [of_group(whole[1]), whole[2][:1, :1], whole[3][:1, :1]]
    compare_results(
        results,
        small,
        lambda *qkv: reference.attention(*qkv, causal=alignment, **options),
        reduction=case.seq,
    )
