"""Rows of a quantized table, beside torch's lookup in an fp32 one."""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, quantize, reference

SHAPE = (50257, 768)


@pytest.fixture(scope="module")
def table():
    torch.manual_seed(0)
    return torch.randn(SHAPE) * 0.02


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 64, 2048])
@torch.no_grad()
def bench_quant_embedding(compare, smoke, table, tokens, scheme):
    if smoke and tokens != 1:
        pytest.skip("not in a smoke run")
    weight = quantize(table, scheme, method="absmax")
    ids = torch.randint(SHAPE[0], (tokens,))

    def check():
        assert torch.equal(ops.quant_embedding(ids, weight), reference.quant_embedding(ids, weight))

    compare(
        lambda: ops.quant_embedding(ids, weight),
        {"fp32": lambda: F.embedding(ids, table)},
        check=check,
        bytes=tokens * SHAPE[1] * (4 + (1 if scheme == "int8" else 0.5)),
        rounds=30,
    )
