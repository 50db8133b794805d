"""Attention beside its peers: SDPA on the CPU; on a GPU every backend of SDPA, and flex_attention.

On a GPU: 16384 tokens of 2048 channels in sequences of 512 to 16384, the shape of Triton's
tutorial, grouped heads, packed sequences of ragged lengths, and each feature beside the plain
kernel (``baselines_ms`` in the JSON). flex_attention, which compiles for every shape, is timed at
4096 keys. Arithmetic is counted as 2 (head_dim + head_dim_v) per pair of query and key, half of the
pairs where causal, exactly where a window, a mask or lengths hide some; backward 2.5 times as much.
Our gradients are the same from run to run, those of the peers as they come by default.

    pytest benchmarks/bench_attention.py -k gpu -n 6 --benchmark-disable  # compiles everything
    pytest benchmarks/bench_attention.py -k gpu --benchmark-only --benchmark-json=out.json
"""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

from . import attention_cases
from .attention_calls import Call, call_of, check_last_rows, compare_results, make_call
from .attention_cases import CASES, DEVICE, PACKED, TOKENS, Feature, ragged
from .marks import lenient, needs_gpu

SHAPES = [  # batch, heads, seq, head_dim, causal
    (2, 4, 32, 32, True),
    (4, 12, 128, 64, True),
    (4, 12, 128, 128, True),
    (4, 12, 256, 64, True),
    (4, 12, 512, 64, False),
    (1, 12, 1024, 64, False),
    (1, 16, 1024, 128, True),
]
DIRECTIONS = ["forward", "forward_backward"]
ROUNDS = 20


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_attention(compare, step, smoke, shape, dtype, dropout_p, direction):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    batch, heads, seq, head_dim, causal = shape
    train = direction == "forward_backward"
    sizes = (batch, heads, seq, head_dim)
    tensors = [random(*sizes, dtype=dtype, requires_grad=train) for _ in range(3)]

    def ours(query, key, value):
        return ops.attention(query, key, value, causal=causal, dropout_p=dropout_p)

    def sdpa(query, key, value):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, dropout_p=dropout_p
        )

    def check():
        small = {n: t[:1, :1] for n, t in zip(("query", "key", "value"), tensors, strict=True)}
        small = {n: t.detach().requires_grad_(train) for n, t in small.items()}
        assert_within_budget(
            ops.attention,
            reference.attention,
            small,
            {"causal": causal, "dropout_p": dropout_p},
            impl="auto",
            reduction=seq,
        )

    def runner(function):
        return step(function, *tensors) if train else lambda: function(*tensors)

    forward = 4 * batch * heads * seq * seq * head_dim * (0.5 if causal else 1.0)
    compare(
        runner(ours),
        {"sdpa": runner(sdpa)},
        check=check,
        flops=forward * (3.5 if train else 1.0),
        bytes=4 * tensors[0].nbytes,
        dtype=dtype,
    )


@needs_gpu
@lenient
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attention_gpu(compare, smoke, case, direction):
    if smoke and case != CASES[0]:
        pytest.skip("not in a smoke run")
    train = direction == "forward_backward"
    call = call_of(case, train)
    feature = attention_cases.make(case)
    leaves = [
        t.requires_grad_() for n, t in feature.ours.items() if n in ("bias", "sinks") and train
    ]

    def ours(query, key, value):
        return ops.attention(query, key, value, causal=case.causal, impl="triton", **feature.ours)

    def plain(query, key, value):
        return ops.attention(query, key, value, causal=case.causal, impl="triton")

    pairs = feature.pairs or case.batch * case.heads * case.seq**2 * (0.5 if case.causal else 1.0)
    peers = attention_cases.peers(case, feature)
    extra = sum(t.nbytes for t in feature.ours.values() if isinstance(t, torch.Tensor))
    compare(
        call.runner(ours, *leaves),
        {name: call.runner(peer, *leaves) for name, peer in peers.items()},
        check=lambda: check_last_rows(call, case, feature.ours),
        flops=2 * pairs * (case.head_dim + case.head_dim_v) * (3.5 if train else 1.0),
        bytes=call.bytes + extra,
        dtype=case.dtype,
        rounds=ROUNDS,
        device=DEVICE,
        baselines={} if case.feature == "plain" else {"plain": call.runner(plain)},
    )


@needs_gpu
@lenient
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mean", PACKED)
def bench_attention_packed_gpu(compare, smoke, mean, direction):
    """Causal, 16 heads of 128: beside flash attention's own packed call, and flex_attention."""
    if smoke:
        pytest.skip("not in a smoke run")
    lengths = ragged(TOKENS, mean)
    longest = max(lengths)
    cu = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    call = make_call([(TOKENS, 16, 128)] * 3, torch.bfloat16, direction == "forward_backward")
    sequence = torch.repeat_interleave(cu.diff())

    def ours(query, key, value):
        cu_seqlens = (cu, cu, longest, longest)
        return ops.attention(query, key, value, causal=True, cu_seqlens=cu_seqlens, impl="triton")

    def varlen(query, key, value):
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0)
        return varlen_attn(query, key, value, cu, cu, longest, longest, window_size=window)

    causal_in_sequence = Feature(
        mask_mod=lambda b, h, q, k: (sequence[q] == sequence[k]) & (q >= k)
    )
    flex_batch = attention_cases.flex(causal_in_sequence, None, TOKENS)

    def flex(*packed):
        return flex_batch(*(t.transpose(0, 1)[None] for t in packed))[0].transpose(0, 1)

    def check():
        results = call.results(ours)
        for length in (longest, min(lengths)):
            start = cu[lengths.index(length)].item()
            rows = slice(start, start + length)
            one = [None if t is None else t[rows, :1].transpose(0, 1)[None] for t in call]
            compare_results(
                [t[rows, :1].transpose(0, 1)[None] for t in results],
                Call(*one).to(torch.bfloat16),
                lambda *qkv: reference.attention(*qkv, causal=True),
                reduction=length,
            )

    pairs = 16 * sum(length**2 for length in lengths) / 2
    compare(
        call.runner(ours),
        {"varlen": call.runner(varlen), "flex": call.runner(flex)},
        check=check,
        flops=4 * pairs * 128 * (3.5 if call.d_out is not None else 1.0),
        bytes=call.bytes,
        dtype=torch.bfloat16,
        rounds=ROUNDS,
        device=DEVICE,
    )
