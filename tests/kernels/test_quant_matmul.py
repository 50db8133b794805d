"""fp8_a16 on the GPU kernels, against the definition of quant_matmul."""

from functools import partial

import pytest
import torch
from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.product_launch import ProductLaunch

from llmos_fast import ops, reference
from llmos_fast.ops.quant_matmul import ACTIVATIONS
from llmos_fast.quantize import interleave, quantize
from llmos_fast.testing import assert_within_budget, random


def check(x, weight, bias=None, activation=None, residual=None, gated=False):
    assert_within_budget(
        partial(ops.quant_matmul, qweight=weight),
        partial(reference.quant_matmul, qweight=weight),
        {"x": x, "bias": bias, "residual": residual},
        {"activation": activation, "gated": gated},
        impl="triton",
        reduction=x.shape[-1],
    )


@pytest.mark.parametrize("rows", [(), (0,), (9,), (2, 35)], ids=str)
@pytest.mark.parametrize("sizes", [(33, 50), (64, 128), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes(rows, sizes, dtype):
    n, k = sizes
    check(random(*rows, k, dtype=dtype), quantize(random(n, k), "fp8_a16"), random(n, dtype=dtype))


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(rows, activation, dtype):
    check(random(rows, 50, dtype=dtype), quantize(random(33, 50), "fp8_a16"), None, activation)


def test_a_bias_in_fp32():
    weight = quantize(random(33, 50), "fp8_a16")
    check(random(9, 50, dtype=torch.bfloat16), weight, random(33))


@pytest.mark.parametrize("rows", [9, 70])
def test_a_residual(rows, dtype):
    residual = random(33, rows, dtype=dtype).T
    check(
        random(rows, 50, dtype=dtype), quantize(random(33, 50), "fp8_a16"), None, "silu", residual
    )


@pytest.mark.parametrize("rows", [(9,), (2, 35)], ids=str)
def test_a_gated_pair(rows):
    weight = interleave(*(quantize(random(33, 50), "fp8_a16") for _ in range(2)))
    check(random(*rows, 50), weight, random(66), "silu", random(*rows, 33), gated=True)


def test_rows_by_tma():
    launch = ProductLaunch(32, 32, 32, 4, 1, PART=16, TMA=True)
    with forced(product=launch):
        check(random(70, 64, dtype=torch.bfloat16), quantize(random(48, 64), "fp8_a16"), random(48))


def test_what_is_refused():
    x = random(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match="computes no gradients"):
        ops.quant_matmul(x, quantize(random(4, 8), "fp8_a16"), impl="triton")


def test_opcheck():
    weight = quantize(random(4, 8), "fp8_a16")
    tensors = (random(3, 8), weight.packed, weight.scales.view(-1), random(4), random(3, 4))
    torch.library.opcheck(torch.ops.llmos_fast.fp8_product_triton.default, (*tensors, "gelu"))
