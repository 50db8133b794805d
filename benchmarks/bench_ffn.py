"""ffn and gated_ffn beside eager PyTorch and torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

SHAPES = [(64, 128, 512), (1024, 256, 1024), (1024, 768, 3072)]  # rows, features, hidden


def eager_ffn(x, w1, b1, w2, b2, dropout_p):
    hidden = F.dropout(F.gelu(F.linear(x, w1, b1)), dropout_p)
    return F.linear(hidden, w2, b2)


def eager_gated(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


# torch.compile imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_ffn(compare, step, smoke, shape, dtype, dropout_p):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    rows, features, hidden = shape
    grad = {"dtype": dtype, "requires_grad": True}
    scale = features**-0.5
    tensors = {
        "x": random(rows, features, **grad),
        "w1": random(hidden, features, scale=scale, **grad),
        "b1": random(hidden, **grad),
        "w2": random(features, hidden, scale=scale, **grad),
        "b2": random(features, **grad),
    }
    values = tuple(tensors.values())

    def check():
        options = {"dropout_p": dropout_p}
        few = tensors | {"x": tensors["x"][:16].detach().requires_grad_()}
        assert_within_budget(
            ops.ffn, reference.ffn, few, options, impl="auto", reduction=2 * hidden
        )

    def eager(*t):
        return eager_ffn(*t, dropout_p)

    peers = {"eager": step(eager, *values)}
    if not smoke:
        torch._dynamo.reset()
        peers["compile"] = step(torch.compile(eager), *values)
    compare(
        step(lambda *t: ops.ffn(*t, dropout_p=dropout_p), *values),
        peers,
        check=check,
        flops=3 * 4 * rows * features * hidden,
        bytes=4 * values[1].nbytes,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_gated_ffn(compare, step, smoke, shape, dtype):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    rows, features, hidden = shape
    grad = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "x": random(rows, features, **grad),
        "w_gate": random(hidden, features, scale=features**-0.5, **grad),
        "w_up": random(hidden, features, scale=features**-0.5, **grad),
        "w_down": random(features, hidden, scale=hidden**-0.5, **grad),
    }
    values = tuple(tensors.values())

    def check():
        few = tensors | {"x": tensors["x"][:16].detach().requires_grad_()}
        assert_within_budget(
            ops.gated_ffn, reference.gated_ffn, few, impl="auto", reduction=2 * hidden
        )

    compare(
        step(ops.gated_ffn, *values),
        {"eager": step(eager_gated, *values)},
        check=check,
        flops=3 * 6 * rows * features * hidden,
        bytes=6 * values[1].nbytes,
        dtype=dtype,
    )
