"""What only a GPU can show of quant_matmul in fp8: its sums, sizes, graphs, repetition."""

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a CUDA GPU of capability 9.0: not run", allow_module_level=True)

from llmos_fast.kernels import fp8_self_test
from llmos_fast.kernels.fp8_rounding import round_to_fp8

from llmos_fast import dispatch, ops, reference
from llmos_fast.ops.quant_matmul import ACTIVATIONS
from llmos_fast.quantize import interleave, quantize
from llmos_fast.reference.quant_matmul import round_activations
from llmos_fast.testing import assert_within_budget, random

DEVICE = torch.device("cuda", torch.cuda.current_device())
SCHEMES = ["fp8", "fp8_block"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_of(n, k, scheme):
    return quantize(random(n, k, scale=k**-0.5).to(DEVICE), scheme)


def pair_of(n, k, scheme):
    return interleave(*(weight_of(n, k, scheme) for _ in range(2)))


def check(weight, m, dtype, **options):
    n, k = weight.shape
    columns = n // 2 if options.get("gated") else n
    tensors = {"x": random(m, k, dtype=dtype), "bias": random(n, dtype=dtype)}
    tensors["residual"] = random(m, columns, dtype=dtype)
    assert_within_budget(
        ops.quant_matmul,
        reference.quant_matmul,
        {name: t.to(DEVICE) for name, t in tensors.items()},
        {"qweight": weight, **options},
        impl="triton",
        reduction=k,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("blocks", [False, True])
def test_passes_its_self_test(blocks, gated, dtype):
    assert fp8_self_test.refusal(DEVICE, blocks, dtype, gated) is None


@pytest.mark.parametrize("m", [1, 16, 17, 33, 64, 65, 300, 2000])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (77, 129), (304, 2512), (4096, 4096)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_size(scheme, n, k, m):
    check(weight_of(n, k, scheme), m, torch.bfloat16)


@pytest.mark.parametrize("m", [1, 16, 17, 33, 64, 65, 300, 2000])
@pytest.mark.parametrize(
    ("scheme", "n", "k"),
    [
        ("fp8", 1, 1),
        ("fp8", 77, 129),
        ("fp8", 304, 2512),
        ("fp8_block", 128, 129),
        ("fp8_block", 384, 2512),
        ("fp8_block", 4096, 4096),
    ],
)
def test_any_size_of_a_pair(scheme, n, k, m):
    check(pair_of(n, k, scheme), m, torch.bfloat16, activation="silu", gated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_epilogue(scheme, activation, dtype):
    weight, pair = weight_of(528, 1040, scheme), pair_of(640, 1040, scheme)
    for m in (13, 200):
        check(weight, m, dtype, activation=activation)
        check(pair, m, dtype, activation=activation, gated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 128, 333, 4096, 20000])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_rounding_is_the_definition(in_blocks, k, dtype):
    group = 128 if in_blocks else k
    x = random(500, k, dtype=dtype)
    found, _ = round_to_fp8(x.to(DEVICE), group)
    # on the CPU, where a division is rounded once
    levels, _ = round_activations(x, "fp8", group)
    assert torch.equal(found.float().cpu(), levels)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_are_not_finite(scheme):
    weight = weight_of(300, 520, scheme)
    for m in (5, 200):
        x = random(m, 520, dtype=torch.bfloat16)
        x[1, 3], x[2, 519] = float("inf"), float("nan")
        y = ops.quant_matmul(x.to(DEVICE), weight, activation="relu", impl="triton")
        assert bool(torch.isnan(y[1:3]).all())
        assert bool(torch.isfinite(y[[0, *range(3, m)]]).all())


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("m", [1, 64, 2048])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_a_thousand_times(scheme, m, gated):
    weight, x = weight_of(4096, 4096, scheme), random(m, 4096, dtype=torch.bfloat16).to(DEVICE)
    expected = ops.quant_matmul(x, weight, gated=gated, impl="triton")
    wrong = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        wrong |= (ops.quant_matmul(x, weight, gated=gated, impl="triton") != expected).any()
    assert not wrong


@pytest.mark.parametrize("m", [1, 300])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_follows_its_input(captured, scheme, m):
    weight, x = weight_of(1000, 4096, scheme), random(m, 4096, dtype=torch.bfloat16).to(DEVICE)
    ops.quant_matmul(x, weight, impl="triton")
    graph, out = captured(lambda: ops.quant_matmul(x, weight, impl="triton"))
    for _ in range(3):
        x.copy_(random(m, 4096))
        graph.replay()
        assert torch.equal(out, ops.quant_matmul(x, weight, impl="triton"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_chosen(scheme):
    weight, x = weight_of(256, 128, scheme), random(1, 128, dtype=torch.bfloat16).to(DEVICE)
    for gated in (False, True):
        assert dispatch.explain(ops.quant_matmul, x, weight, gated=gated)[1] == ("triton", None)
