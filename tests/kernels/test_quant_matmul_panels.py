"""int8, int4, int4_asym and nf4 weights on the GPU kernels, against the definition."""

import warnings

import pytest
import torch
from llmos_fast.kernels import panel_product, quant_matmul_panels, quant_matmul_self_test, verdicts
from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.panel_launch import PanelLaunch
from llmos_fast.kernels.quant_matmul_self_test import Case
from llmos_fast.kernels.round_rows import round_rows

from llmos_fast import ops, reference
from llmos_fast.ops.quant_matmul import ACTIVATIONS
from llmos_fast.quantize import from_codes, interleave, quantize
from llmos_fast.reference.quant_matmul import round_activations
from llmos_fast.testing import assert_within_budget, random, registered_calls

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INTEGER = ["int8", "int4", "int4_asym"]
SCHEMES = ["int8_a16", "int4_a16", "int4_asym_a16", "nf4", *INTEGER]
FOUR_BIT = ["int4_a16", "int4_asym_a16", "nf4", "int4", "int4_asym"]
# rows of x, n, k, dtype, group size
SIZES = [
    ((), 1, 1, FP32, 32),
    ((9,), 77, 261, BF16, 32),
    ((2, 10), 33, 150, FP16, 64),
    ((35,), 50, 300, FP32, 128),
    ((0,), 20, 40, BF16, 32),
]


def weight_of(n, k, scheme, group_size=32):
    return quantize(random(n, k), scheme, group_size)


def pair_of(n, k, scheme, group_size=32):
    return interleave(*(weight_of(n, k, scheme, group_size) for _ in range(2)))


def check(weight, x, bias=None, residual=None, **options):
    assert_within_budget(
        ops.quant_matmul,
        reference.quant_matmul,
        {"x": x, "bias": bias, "residual": residual},
        {"qweight": weight, **options},
        impl="triton",
        reduction=weight.shape[1],
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sizes(scheme, size):
    rows, n, k, dtype, group_size = size
    tensors = random(*rows, k, dtype=dtype), random(n, dtype=dtype), random(*rows, n, dtype=dtype)
    check(weight_of(n, k, scheme, group_size), *tensors, activation="silu")


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_groups(scheme, group_size):
    check(weight_of(20, 272, scheme, group_size), random(3, 272))


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scheme", ["int4_a16", "int8"])
def test_activations(scheme, activation, gated):
    weight = (pair_of if gated else weight_of)(32, 70, scheme)
    bias, residual = random(weight.shape[0], dtype=BF16), random(5, 32, dtype=BF16)
    check(weight, random(5, 70, dtype=BF16), bias, residual, activation=activation, gated=gated)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gated_pairs(scheme):
    """More panels than one tile has, and parts of k."""
    check(pair_of(80, 300, scheme), random(3, 300), random(160), activation="silu", gated=True)


def test_a_bias_in_fp32():
    for scheme in ("int4_a16", "int8"):
        check(weight_of(33, 50, scheme), random(9, 50, dtype=BF16), random(33))


@pytest.mark.parametrize("scheme", ["nf4", "int4", "int8"])
def test_views(scheme):
    weight, wide = weight_of(20, 48, scheme), random(6, 100)
    residual = random(20, 6).T
    for x in (wide[:, :48], wide[:, 3:51], wide[:, :96:2], wide[:1, :48].expand(6, 48)):
        expected = ops.quant_matmul(
            x.contiguous(), weight, residual=residual.contiguous(), impl="triton"
        )
        found = ops.quant_matmul(x, weight, residual=residual, impl="triton")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("scheme", ["int4_asym_a16", "nf4", "int4_asym", "int8"])
@pytest.mark.parametrize("block_k", [32, 128])
def test_other_tiles(scheme, gated, block_k):
    """Blocks of less than a group of 64 and, where the activations are not rounded, of more."""
    block_k = block_k if scheme in ("int8", "nf4", "int4_asym_a16") else 32
    with forced(panel_product=PanelLaunch(32, 64, block_k, 4, 1, 32)):
        weight = (pair_of if gated else weight_of)(48, 296, scheme, 64)
        check(weight, random(40, 296), random(weight.shape[0]), gated=gated)


@pytest.mark.parametrize("scheme", ["int4_a16", "int8_a16"])
def test_many_rows(scheme):
    rows = quant_matmul_panels.MAX_ROWS + 1
    bias, residual = random(40), random(rows, 40, dtype=BF16)
    check(weight_of(40, 45, scheme), random(rows, 45, dtype=BF16), bias, residual)


def integer_weight(scheme, n, k, group):
    """Scales of powers of 2: a product of integers has one right answer."""
    four_bit = not scheme.startswith("int8")
    groups = -(-k // group) if four_bit else 1
    codes = torch.randint(0, 16 if four_bit else 256, (n, k))
    zeros = torch.randint(0, 16, (n, groups)) if scheme.startswith("int4_asym") else None
    scales = 2.0 ** torch.randint(-2, 3, (n, groups)).float()
    return from_codes(codes.to(torch.uint8), scales, zeros, scheme, group)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "nf4"])
def test_integers_are_exact(scheme, group):
    weight = integer_weight(scheme, 40, 261, group)
    x = torch.randint(-127, 128, (14, 261)).float()
    x[:, ::32] = 127  # so that the scale of every group is 1
    truth = x.double() @ weight.dequantize(torch.float64).T
    assert torch.equal(ops.quant_matmul(x, weight, impl="triton").double(), truth)


def test_sums_are_integers():
    """fp32 does not hold this sum, nor one of its parts: 4096 products of 127, and one more."""
    weight = from_codes(torch.full((16, 4097), 255, dtype=torch.uint8), torch.ones(16, 1), None,
                        "int8", 128)  # fmt: skip
    x = torch.full((1, 4097), 127.0)
    x[0, 0] = 126
    expected = torch.tensor((4096 * 127 + 126) * 127).float().expand(1, 16)
    assert torch.equal(ops.quant_matmul(x, weight, impl="triton"), expected)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("k", "group_size"), [(261, 32), (300, 128), (261, 261), (5, 5)], ids=str)
def test_activations_are_rounded_as_defined(dtype, k, group_size):
    x = random(6, k, dtype=dtype)
    x[1] = 0
    x[2] = torch.arange(k) % 255 - 127.0
    x[3] = x[2] / 2  # every second one half way between two integers
    x[4, -1] = 1000
    integers, scales = round_rows(x.T.contiguous().T, group_size)
    expected, expected_scales = round_activations(x, "int8", group_size)
    assert torch.equal(integers[:, :k].float(), expected)
    assert not integers[:, k:].any()
    spread = scales.T.repeat_interleave(group_size, dim=1)[:, :k]
    assert torch.equal(spread, expected_scales)


def test_near_halves_are_rounded_as_defined():
    """Where the quotient 127 / amax and amax.reciprocal() * 127 lead to different integers."""
    amax = 1 + torch.rand(2**16)
    x = amax * (torch.randint(0, 127, amax.shape) + 0.5) / 127
    quotient = torch.full_like(amax, 127.0) / amax
    differs = (x * quotient).round() != (x * (amax.reciprocal() * 127)).round()
    rows = torch.stack((amax, x), dim=1)[differs][:50]
    assert len(rows) == 50
    assert torch.equal(round_rows(rows, 2)[0][:, :2].float(), round_activations(rows, "int8", 2)[0])


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite(scheme, bad):
    weight, x = weight_of(20, 70, scheme), random(5, 70)
    x[2, 40] = bad
    found = ops.quant_matmul(x, weight, impl="triton")
    assert found[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], ops.quant_matmul(x[others], weight, impl="triton"))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4", "int4_asym", "nf4"])
def test_dense_weights(scheme, dtype):
    for n, k in ((77, 90), (16, 64)):
        weight = weight_of(n, k, scheme)
        parts = weight.packed, weight.scales, weight.zero_points
        rest = scheme, weight.group_size, n, k, dtype
        found = quant_matmul_panels.dequantize(*parts, *rest)
        assert torch.equal(found, weight.dequantize(dtype))


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("scheme", ["int4_a16", "nf4", "int8"])
def test_gradients(scheme, gated):
    weight = (pair_of if gated else weight_of)(32, 40, scheme)
    tensors = random(3, 40), random(weight.shape[0], dtype=FP32), random(3, 32)
    for activation in (None, "silu"):
        check(weight, *(t.requires_grad_() for t in tensors), activation=activation, gated=gated)


def test_gradients_of_gradients():
    weight, x = weight_of(6, 10, "int8_a16"), random(4, 10, requires_grad=True)

    def second(impl):
        y = ops.quant_matmul(x, weight, activation="silu", impl=impl)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second("triton"), second("reference"))


def test_opcheck():
    weight = weight_of(20, 40, "int4_asym_a16")
    x, bias = random(3, 40, requires_grad=True), random(20, requires_grad=True)
    with registered_calls() as calls:
        ops.quant_matmul(x, weight, bias, impl="triton").sum().backward()
    assert set(calls) == {"llmos_fast::quant_matmul_triton", "llmos_fast::dequantize_triton"}
    for function, arguments in calls.values():
        torch.library.opcheck(function, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph():
    torch._dynamo.reset()
    weight, x = weight_of(20, 40, "int4"), random(3, 40, requires_grad=True)
    compiled = torch.compile(ops.quant_matmul, fullgraph=True, backend="aot_eager")
    found = compiled(x, weight, activation="relu", impl="triton")
    expected = ops.quant_matmul(x, weight, activation="relu", impl="triton")
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), x)[0])


def test_what_is_refused():
    with pytest.raises(ValueError, match="needs bfloat16, float16 or float32"):
        ops.quant_matmul(random(2, 8).double(), weight_of(4, 8, "int4"), impl="triton")
    k = quant_matmul_panels.MAX_INTEGER_K + 1
    codes = torch.zeros(1, k, dtype=torch.uint8)
    weight = from_codes(codes, torch.ones(1, 1), None, "int8", 128)
    with pytest.raises(ValueError, match=f"sums in int32: it needs K <= 131072, got {k}"):
        ops.quant_matmul(torch.zeros(1, k), weight, impl="triton")


# the self-test of launches

CPU = torch.device("cpu")
CASES = [
    Case("int4_asym_a16", 32, BF16, 16, False),
    Case("nf4", 64, FP16, 16, True),
    Case("nf4", 64, FP32, 16, False),
    Case("int8", 0, BF16, 16, True),
    Case("int4", 32, FP16, 16, False),
]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(quant_matmul_self_test, "SIZES", ((48, 296), (45, 43)))
    monkeypatch.setattr(quant_matmul_self_test, "GATED_SIZES", ((96, 296), (32, 43)))
    monkeypatch.setattr(quant_matmul_self_test, "ROUNDS", 1)


def passes(case):
    kernels = quant_matmul_panels.product, quant_matmul_panels._dequantize
    return quant_matmul_self_test.passes(case, *kernels, CPU)


@pytest.mark.parametrize("case", CASES, ids=quant_matmul_self_test.name)
def test_passes_its_self_test(small, case):
    assert passes(case)


@pytest.mark.parametrize("case", CASES[:1], ids=quant_matmul_self_test.name)
def test_one_wrong_number_fails_it(small, case, monkeypatch):
    launch = panel_product.panel_product

    def spoiled(left, left_scales, weight, epilogue, out, activation):
        launch(left, left_scales, weight, epilogue, out, activation)
        out[-1, -1] += 0.25

    monkeypatch.setattr(quant_matmul_panels, "panel_product", spoiled)
    assert not passes(case)


def test_what_fails_is_not_used(monkeypatch, tmp_path):
    kept = {}
    monkeypatch.setattr(verdicts, "INTERPRETED", False)
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setattr(quant_matmul_self_test, "passes", lambda case, *_: case.scheme != "nf4")
    monkeypatch.setattr(verdicts, "load", lambda device: dict(kept))
    monkeypatch.setattr(verdicts, "store", lambda device, found: kept.update(found))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = random(2, 40)
    with pytest.warns(UserWarning, match=r"quant_matmul\(nf4, groups of 32.*fails its self-test"):
        refused = quant_matmul_panels.unsupported(x, weight_of(4, 40, "nf4"), None, False, None)
    assert "fails its self-test" in refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = weight_of(4, 40, "int4")
        assert quant_matmul_panels.unsupported(x, weight, None, False, None) is None
    assert sorted(kept.values()) == [False, True]
    # the operator, which a compiled graph calls without asking, asks itself
    weight = weight_of(4, 40, "nf4")
    parts = weight.packed, weight.scales, weight.zero_points, None, None
    op = torch.ops.llmos_fast.quant_matmul_triton
    found = op(x, *parts, "nf4", 32, 4, "", False)
    assert torch.equal(found, reference.quant_matmul(x, weight))
