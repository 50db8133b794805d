"""Rows of a table beside torch's lookup."""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import capture, ops, reference

SHAPE = (50257, 768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 64, 2048])
@torch.no_grad()
def bench_embedding(compare, smoke, tokens, dtype):
    """Ours is captured, as in a step of decoding; ``calls``: the same from Python."""
    if smoke and tokens != 1:
        pytest.skip("not in a smoke run")
    weight = torch.randn(SHAPE).to(dtype)
    ids = torch.randint(SHAPE[0], (tokens,))

    def check():
        assert torch.equal(ops.embedding(ids, weight), reference.embedding(ids, weight))

    compare(
        capture(lambda ids: ops.embedding(ids, weight), ids).replay,
        {"eager": lambda: F.embedding(ids, weight)},
        baselines={"calls": lambda: ops.embedding(ids, weight)},
        check=check,
        bytes=2 * tokens * SHAPE[1] * weight.element_size(),
        dtype=dtype,
        rounds=30,
    )
