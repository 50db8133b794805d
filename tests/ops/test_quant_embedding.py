"""Rows of a quantized table: the kernel against the definition, and what both refuse."""

import pytest
import torch

from llmos_fast import explain, ops, quantize
from llmos_fast.native.common import FORMAT_CODES
from llmos_fast.testing import random

IMPLEMENTATIONS = ["native", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("columns", [1, 30, 64, 70, 500])
@pytest.mark.parametrize("scheme", FORMAT_CODES)
def test_native_gives_the_bits_of_the_definition(scheme, columns, index, dtype):
    table = quantize(random(37, columns), scheme, 32, "absmax")
    for ids in (torch.randint(37, (5, 40)), torch.arange(37).flip(0)[::2], torch.tensor(36)):
        ids = ids.to(index)
        rows = ops.quant_embedding(ids, table, dtype, impl="native")
        assert rows.dtype == dtype
        assert torch.equal(rows, ops.quant_embedding(ids, table, dtype, impl="reference"))
        assert torch.equal(rows, table.dequantize(dtype)[ids.long()])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bad_input(impl):
    table = quantize(random(20, 8), "int8")
    for bad in (-1, 20, 2**40):
        with pytest.raises(
            IndexError, match=rf"quant_embedding: ids must be in \[0, 20\), got {bad}"
        ):
            ops.quant_embedding(torch.tensor([3, bad]), table, impl=impl)
    with pytest.raises(ValueError, match="quant_embedding: ids must be int32 or int64"):
        ops.quant_embedding(torch.zeros(3), table, impl=impl)
    with pytest.raises(ValueError, match="quant_embedding: ids must be on qweight's cpu, got meta"):
        ops.quant_embedding(torch.zeros(3, dtype=torch.int64, device="meta"), table, impl=impl)
    with pytest.raises(ValueError, match="quant_embedding: dtype must be floating point"):
        ops.quant_embedding(torch.tensor([3]), table, torch.int8, impl=impl)
    with pytest.raises(ValueError, match="quant_embedding: qweight must be a QuantizedWeight"):
        ops.quant_embedding(torch.tensor([3]), random(20, 8), impl=impl)
    assert ops.quant_embedding(torch.zeros(0, 3).long(), table, impl=impl).shape == (0, 3, 8)


def test_other_dtypes_take_the_definition():
    table = quantize(random(20, 8), "int8")
    ids = torch.tensor([3])
    answers = explain(ops.quant_embedding, ids, table, torch.float16)
    assert answers[0].reason == "needs float32 or bfloat16, got torch.float16"
    assert torch.equal(
        ops.quant_embedding(ids, table, torch.float64), table.dequantize(torch.float64)[ids]
    )


def test_opcheck():
    w = quantize(random(20, 64), "int4_asym", 32)
    rest = (w.scheme, w.group_size, *w.shape, torch.float32)
    torch.library.opcheck(
        torch.ops.llmos_fast.quant_embedding.default,
        (torch.tensor([3, 4]), w.packed, w.scales, w.zero_points, *rest),
    )
