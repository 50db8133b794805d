"""Attention of the newest tokens to a cache of keys and values, beside what torch has for it.

CPU: caches of 256 to 4096 keys, several in turn which together are larger than the caches of the
machine, beside scaled_dot_product_attention; 8-bit caches have no peer.

GPU: caches of 1k to 128k keys; 32 heads of 128 over 8 heads of the cache unless a case says
otherwise. The peers read a dense cache that is exactly full, the one thing they all take. Caches in
pages or in 8 bits have no peer in torch: they and the features stand beside our own plain call
(``baselines_ms``).

What counts is the share of the memory's bandwidth.

    pytest benchmarks/bench_attention_decode.py --benchmark-only --benchmark-json=out.json
"""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmos_fast import ops, reference
from llmos_fast.testing import assert_close_to_truth, assert_within_budget, native_precision

from .attention_cases import DEVICE, Feature, flex
from .marks import lenient, needs_gpu
from .quant_peers import TOUCHED

PAGE_SIZE = 64
WINDOW = 1024
ROUNDS = 30
# flex_attention takes seconds to compile for each shape
FLEX_LENGTH = 16384


class Case(NamedTuple):
    """``cache`` is "dense", "paged", "int8" or "fp8"; ``feature`` one of FEATURES."""

    batch: int
    length: int
    heads: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    seq_q: int = 1
    cache: str = "dense"
    feature: str = "plain"

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.heads_kv}"
        words = [f"{self.batch}x{heads}x{self.seq_q}x{self.length}x{self.head_dim}"]
        return " ".join([*words, *(w for w in self[6:] if w not in ("dense", "plain"))])


CASES = [
    *(Case(batch, 2**k) for batch in (1, 16) for k in (10, 12, 14, 16, 17)),
    Case(1, 16384, heads_kv=32),
    Case(16, 16384, heads_kv=1),
    Case(16, 16384, head_dim=64),
    Case(16, 16384, head_dim=256),
    Case(16, 16384, seq_q=4),
    *(Case(batch, 16384, cache=c) for batch in (1, 16) for c in ("paged", "int8", "fp8")),
    *(Case(16, 16384, feature=feature) for feature in ("window", "alibi", "softcap", "sinks")),
]


CPU_CASES = [
    *(Case(batch, length, heads, kv, 64) for batch in (1, 8) for length, heads, kv in
      ((256, 12, 12), (1024, 12, 12), (256, 32, 4))),
    *(Case(batch, 2048, head_dim=head_dim) for batch in (1, 8) for head_dim in (64, 128)),
    Case(1, 2048, heads_kv=32),
    Case(8, 4096),
]  # fmt: skip
CPU_CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@pytest.mark.parametrize("cache", CPU_CACHES)
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
@torch.no_grad()
def bench_attention_decode(compare, smoke, case, cache):
    if smoke and case != CPU_CASES[0]:
        pytest.skip("not in a smoke run")
    batch, length, heads, heads_kv, head_dim, _ = case[:6]
    dtype = torch.bfloat16 if cache == "bf16" else torch.float32
    query = torch.randn(batch, heads, 1, head_dim, dtype=dtype)
    lengths = torch.full((batch,), length)
    shape = (batch, heads_kv, length, head_dim)
    calls = []
    while not calls or sum(t.nbytes for call in calls for t in call.values()) < TOUCHED:
        key, value = (torch.randn(shape, dtype=dtype) for _ in range(2))
        call = {"key_cache": key, "value_cache": value}
        if cache == "int8":
            for name, x in (("key", key), ("value", value)):
                scale = x.abs().amax(-1) / 127
                call[f"{name}_cache"] = (x / scale[..., None]).round().char()
                call[f"{name}_scale"] = scale
        calls.append(call)

    def ours():
        for call in calls:
            out = ops.attention_decode(query, cache_lengths=lengths, **call)
        return out

    def sdpa():
        for call in calls:
            F.scaled_dot_product_attention(
                query, call["key_cache"], call["value_cache"], enable_gqa=heads != heads_kv
            )

    def check():
        tensors = {"query": query, **{n: t for n, t in calls[0].items() if t.dtype != torch.int8}}
        options = {n: t for n, t in calls[0].items() if t.dtype == torch.int8}
        assert_within_budget(
            ops.attention_decode,
            reference.attention_decode,
            tensors,
            options | {"cache_lengths": lengths},
            impl="auto",
            reduction=head_dim * length,
        )

    compare(
        ours,
        {} if cache == "int8" else {"sdpa": sdpa},
        check=check,
        flops=4 * batch * heads * length * head_dim,
        bytes=sum(t.nbytes for t in calls[0].values()),
        dtype=dtype,
        rounds=20,
        calls={"ours": len(calls)} | ({} if cache == "int8" else {"sdpa": len(calls)}),
    )


def options_of(case: Case) -> dict[str, Any]:
    """Keywords of the feature."""
    if case.feature == "window":
        return {"window": (WINDOW, -1)}
    if case.feature == "softcap":
        return {"softcap": 30.0}
    if case.feature == "alibi":
        steps = torch.arange(1, case.heads + 1, device=DEVICE)
        return {"alibi_slopes": 2.0 ** (-8 * steps / case.heads)}
    return {} if case.feature == "plain" else {"sinks": torch.randn(case.heads, device=DEVICE)}


def stored(case: Case, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The cache as the case stores it, and its scale for each head and token."""
    if case.cache == "dense":
        return cache, None
    if case.cache == "paged":
        return cache.unflatten(2, (-1, PAGE_SIZE)).transpose(1, 2).flatten(0, 1).contiguous(), None
    dtype, largest = (torch.int8, 127) if case.cache == "int8" else (torch.float8_e4m3fn, 448)
    scale = cache.abs().amax(-1).float() / largest
    values = cache / scale[..., None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def bytes_of(case: Case, caches: list[torch.Tensor], scales: list[torch.Tensor | None]) -> float:
    """Keys and values that are visible, and their scales."""
    everything = sum(t.nbytes for t in (*caches, *scales) if t is not None)
    seen = min(case.length, WINDOW + case.seq_q) if case.feature == "window" else case.length
    return everything * seen / case.length


def check(case: Case, out: torch.Tensor, call: dict[str, Any]) -> None:
    """The first sequence and the first head of the cache, beside the definition."""
    group = case.heads // case.heads_kv
    small = dict(call)
    small["query"] = call["query"][:1, :group]
    for name in ("key_cache", "value_cache"):
        small[name] = call[name][:, :1] if case.cache == "paged" else call[name][:1, :1]
    for name in ("key_scale", "value_scale"):
        small[name] = None if call[name] is None else call[name][:1, :1]
    for name in ("cache_lengths", "block_table"):
        small[name] = None if call[name] is None else call[name][:1]
    for name in ("alibi_slopes", "sinks"):
        if name in call:
            small[name] = call[name][:group]
    in_double = small | {"query": small["query"].double()}
    if case.cache in ("dense", "paged"):
        in_double |= {n: small[n].double() for n in ("key_cache", "value_cache")}
    truth = reference.attention_decode(**in_double)
    with native_precision():
        eager = reference.attention_decode(**small)
    assert_close_to_truth(out[:1, :group], eager, truth, reduction=case.length)


def peers_of(
    case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> dict[str, Any]:
    if (case.seq_q, case.cache, case.feature) != (1, "dense", "plain"):
        return {}

    def sdpa(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    peers = {
        "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    }
    if case.length == FLEX_LENGTH:
        peers["flex"] = partial(flex(Feature(), None, case.length), query, key, value)
    return peers


@needs_gpu
@lenient
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attention_decode_gpu(compare, smoke, case):
    if smoke and case != CASES[0]:
        pytest.skip("not in a smoke run")
    batch, length, heads, heads_kv, head_dim, seq_q = case[:6]
    draw = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
    query = draw(batch, heads, seq_q, head_dim)
    key, value = draw(2, batch, heads_kv, length, head_dim)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    (key_cache, key_scale), (value_cache, value_scale) = stored(case, key), stored(case, value)
    block_table = None
    if case.cache == "paged":
        # a sequence's pages lie anywhere
        order = torch.randperm(key_cache.shape[0], device=DEVICE)
        key_cache, value_cache = key_cache[order], value_cache[order]
        block_table = order.argsort().int().view(batch, -1)
    call = {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "cache_lengths": lengths,
        "block_table": block_table,
        "key_scale": key_scale,
        "value_scale": value_scale,
        **options_of(case),
    }
    ours = partial(ops.attention_decode, **call, impl="triton")
    plain = partial(ops.attention_decode, query[:, :, :1], key, value, lengths, impl="triton")
    is_plain = (case.seq_q, case.cache, case.feature) == (1, "dense", "plain")
    compare(
        ours,
        peers_of(case, query, key, value),
        check=lambda: check(case, ours(), call),
        flops=4 * batch * heads * seq_q * length * head_dim,
        bytes=bytes_of(case, [key_cache, value_cache], [key_scale, value_scale]),
        dtype=query.dtype,
        rounds=ROUNDS,
        device=DEVICE,
        baselines={} if is_plain else {"plain": plain},
    )
