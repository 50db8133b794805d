"""Attention beside SDPA, with and without dropout."""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

SHAPES = [  # batch, heads, seq, head_dim, causal
    (2, 4, 32, 32, True),
    (4, 12, 256, 64, True),
    (4, 12, 512, 64, False),
    (1, 12, 1024, 64, False),
    (1, 16, 1024, 128, True),
]


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
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
