"""What only a GPU can show of quant_matmul's Triton kernels: formats, sizes, graphs, repetition."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast.kernels.round_rows import round_rows

from llmos_fast import explain, ops, reference
from llmos_fast.ops.quant_matmul import ACTIVATIONS
from llmos_fast.quantize import interleave, quantize
from llmos_fast.reference.quant_matmul import round_activations
from llmos_fast.testing import assert_within_budget, random

DEVICE = torch.device("cuda", torch.cuda.current_device())
SCHEMES = ["int8_a16", "int4_a16", "int4_asym_a16", "nf4", "int8", "int4", "int4_asym"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_of(n, k, scheme, group_size=128):
    return quantize(random(n, k, scale=k**-0.5).to(DEVICE), scheme, group_size)


def product(x, weight, **options):
    return ops.quant_matmul(x, weight, impl="triton", **options)


def check(weight, m, dtype, residual=False, requires_grad=False, **options):
    n, k = weight.shape
    columns = n // 2 if options.get("gated") else n
    tensors = {"x": random(m, k, dtype=dtype), "bias": random(n, dtype=dtype)}
    tensors |= {"residual": random(m, columns, dtype=dtype)} if residual else {}
    assert_within_budget(
        ops.quant_matmul,
        reference.quant_matmul,
        {name: t.to(DEVICE).requires_grad_(requires_grad) for name, t in tensors.items()},
        {"qweight": weight, **options},
        impl="triton",
        reduction=k,
    )


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("rows", [1, 20, 50, 200, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_launch_passes_its_self_test(scheme, group_size, dtype, rows, gated):
    x, weight = random(rows, 128, dtype=dtype).to(DEVICE), weight_of(64, 128, scheme, group_size)
    assert dict(explain(ops.quant_matmul, x, weight, gated=gated))["triton"] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 17, 33, 64, 65, 129, 513])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (77, 129), (300, 2500), (4096, 4096)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_size(scheme, n, k, m, dtype):
    check(weight_of(n, k, scheme), m, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scheme", ["int8_a16", "int4", "int8"])
def test_epilogue(scheme, activation):
    check(weight_of(530, 1028, scheme), 13, torch.bfloat16, residual=True, activation=activation)
    pair = interleave(*(weight_of(528, 1028, scheme) for _ in range(2)))
    check(pair, 13, torch.bfloat16, residual=True, activation=activation, gated=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 128, 4100])
def test_activations_are_rounded_as_defined(group_size, dtype):
    """Also where the product is next to a half: it is rounded before it becomes an integer."""
    x = random(4096, 4100, dtype=dtype).to(DEVICE)
    integers, scales = round_rows(x, group_size)
    expected, expected_scales = round_activations(x, "int8", group_size)
    assert torch.equal(integers[:, :4100].float(), expected)
    assert torch.equal(scales.T.repeat_interleave(group_size, dim=1)[:, :4100], expected_scales)


@pytest.mark.parametrize("m", [1, 32, 64, 256])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_a_thousand_times(scheme, m):
    weight, x = weight_of(4096, 4096, scheme), random(m, 4096, dtype=torch.bfloat16).to(DEVICE)
    expected = product(x, weight)
    wrong = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        wrong |= (product(x, weight) != expected).any()
    assert not wrong


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("scheme", ["int4_a16", "int8"])
def test_a_graph_follows_its_input(captured, scheme, m):
    weight, x = weight_of(1000, 4096, scheme), random(m, 4096, dtype=torch.bfloat16).to(DEVICE)
    graph, out = captured(lambda: product(x, weight))
    for _ in range(3):
        x.copy_(random(m, 4096))
        graph.replay()
        assert torch.equal(out, product(x, weight))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients(scheme):
    weight = weight_of(300, 520, scheme)
    check(weight, 9, torch.bfloat16, residual=True, requires_grad=True, activation="silu")
