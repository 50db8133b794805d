"""Attention with its weights, their mean over the heads, beside what torch.nn computes for them.

``attention`` among the baselines is our own call without weights: what they cost on top of it.
Arithmetic is counted as for attention; the products that are computed again count as time alone.

    pytest benchmarks/bench_attention_weights.py --benchmark-only --benchmark-json=out.json
"""

import pytest
import torch

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

SHAPES = {  # batch, heads, seq, head_dim
    "cpu": [(2, 4, 32, 32), (4, 12, 256, 64), (1, 12, 1024, 64)],
    "cuda": [(2, 4, 32, 32), (16, 16, 512, 64), (4, 16, 2048, 64), (4, 16, 2048, 128)],
}
CASES = [(device, shape) for device, shapes in SHAPES.items() for shape in shapes]
needs = {"cpu": True, "cuda": torch.cuda.is_available()}


def torch_nn(query, key, value, dropout_p):
    """The part of torch.nn.functional.multi_head_attention_forward between the projections."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout_p)
    return weights @ value, weights.mean(1)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("device", "shape"), CASES, ids=str)
def bench_attention_weights(compare, step, smoke, device, shape, dtype, dropout_p, direction):
    if not needs[device]:
        pytest.skip("needs a CUDA GPU: not run")
    if smoke and shape != SHAPES[device][0]:
        pytest.skip("not in a smoke run")
    batch, heads, seq, head_dim = shape
    train = direction == "forward_backward"
    sizes = (batch, heads, seq, head_dim)
    tensors = [random(*sizes, dtype=dtype).to(device).requires_grad_(train) for _ in range(3)]

    def ours(query, key, value):
        return ops.attention_weights(query, key, value, dropout_p=dropout_p, average_heads=True)

    def attention(query, key, value):
        return ops.attention(query, key, value, dropout_p=dropout_p)

    def theirs(query, key, value):
        return torch_nn(query, key, value, dropout_p)

    def check():
        names = ("query", "key", "value")
        assert_within_budget(
            ops.attention_weights,
            reference.attention_weights,
            {n: t[:1, :2].detach() for n, t in zip(names, tensors, strict=True)},
            {"dropout_p": dropout_p, "average_heads": True},
            impl="auto",
            reduction=seq,
        )

    def runner(function):
        # the gradient of the output alone: hardly anyone has one of the weights
        return step(function, *tensors) if train else lambda: function(*tensors)

    compare(
        runner(ours),
        {"torch.nn": runner(theirs)},
        check=check,
        flops=4 * batch * heads * seq * seq * head_dim * (3.5 if train else 1.0),
        bytes=4 * tensors[0].nbytes + batch * seq * seq * dtype.itemsize,
        dtype=dtype,
        device=device,
        baselines={"attention": runner(attention)},
    )
