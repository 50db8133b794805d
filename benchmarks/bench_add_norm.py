"""add_norm, dropout and rotary: what memory bandwidth decides."""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

SHAPES = [(128, 128), (1024, 256), (1024, 768), (2048, 4096)]  # rows, features


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_add_norm(compare, step, smoke, shape, dtype, dropout_p):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    grad = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "x": random(*shape, **grad),
        "residual": random(*shape, **grad),
        "weight": random(shape[1], **grad),
        "bias": random(shape[1], **grad),
    }
    values = tuple(tensors.values())

    def eager(x, residual, weight, bias):
        return F.layer_norm(residual + F.dropout(x, dropout_p), shape[1:], weight, bias)

    def check():
        assert_within_budget(
            ops.add_norm,
            reference.add_norm,
            tensors,
            {"dropout_p": dropout_p},
            impl="auto",
            reduction=max(shape),
        )

    compare(
        step(lambda *t: ops.add_norm(*t, dropout_p=dropout_p), *values),
        {"eager": step(eager, *values)},
        check=check,
        # forward: read x and residual, write both results; backward: read two, write two
        bytes=8 * values[0].nbytes,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_dropout(compare, smoke, shape, dtype):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    x = random(*shape, dtype=dtype)

    def check():
        assert_within_budget(
            ops.dropout, reference.dropout, {"x": x}, {"p": 0.1}, impl="auto", reduction=1
        )

    compare(
        lambda: ops.dropout(x, 0.1),
        {"eager": lambda: F.dropout(x, 0.1)},
        check=check,
        bytes=2 * x.nbytes,
        dtype=dtype,
    )


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("seq", [32, 512])
def bench_rotary(compare, smoke, seq, interleaved):
    if smoke and seq != 32:
        pytest.skip("not in a smoke run")
    tensors = {
        "query": random(4, 12, seq, 64),
        "key": random(4, 4, seq, 64),
        "cos": random(seq, 32),
        "sin": random(seq, 32),
    }
    options = {"interleaved": interleaved}

    def check():
        assert_within_budget(
            ops.rotary, reference.rotary, tensors, options, impl="auto", reduction=2
        )

    compare(
        lambda: ops.rotary(**tensors, **options),
        {"eager": lambda: reference.rotary(**tensors, **options)},
        check=check,
        bytes=2 * (tensors["query"].nbytes + tensors["key"].nbytes),
    )
