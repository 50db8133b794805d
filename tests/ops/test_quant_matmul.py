"""quant_matmul against its definition: every scheme, instruction set and awkward size."""

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import _C, dispatch, explain, ops, reference
from llmos_fast.native import quant_matmul as native
from llmos_fast.native.common import FORMAT_CODES
from llmos_fast.ops.quant_matmul import ACTIVATIONS
from llmos_fast.quantize import (
    FORMATS,
    QuantizedWeight,
    from_codes,
    interleave,
    quantize,
)
from llmos_fast.reference.quant_matmul import apply_activation, round_activations
from llmos_fast.testing import assert_close_to_truth, assert_within_budget, random

SETS = tuple(_C.cpu_sets())
SCHEMES = tuple(FORMAT_CODES)  # that the kernels take
SIZES = [(1, 1, 1), (7, 63, 253), (63, 7, 65), (13, 130, 128), (1, 253, 300), (2, 16, 32)]


quant_matmul = ops.quant_matmul


def check(weight, x, bias=None, activation=None, impl="native"):
    """Within the budget: outputs, and the gradients that x and bias ask for."""
    assert_within_budget(
        quant_matmul,
        reference.quant_matmul,
        {"x": x, "bias": bias},
        {"qweight": weight, "activation": activation},
        impl=impl,
        reduction=weight.shape[1],
    )


@pytest.mark.parametrize(("m", "n", "k"), SIZES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_matches_definition(cpu_set, scheme, m, n, k):
    weight = quantize(random(n, k), scheme, group_size=32)
    check(weight, random(m, k), random(n), "silu")


@pytest.mark.parametrize("cpu_set", SETS, indirect=True)
@pytest.mark.parametrize("m", [5, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_narrow_activations(cpu_set, scheme, dtype, m):
    weight = quantize(random(50, 277), scheme, group_size=64)
    check(weight, random(m, 277, dtype=dtype), random(50, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_and_gradients(cpu_set, activation, dtype):
    weight = quantize(random(33, 70), "int8_a16")
    x = random(9, 70, dtype=dtype, scale=3.0)
    bias = random(33, dtype=dtype)
    check(weight, x, bias, activation)
    check(weight, x.requires_grad_(), bias.requires_grad_(), activation)


@pytest.mark.parametrize("m", [1, 6, 7, 257, 258, 259])
@pytest.mark.parametrize("scheme", ["int8", "int4_asym", "nf4"])
def test_around_the_sizes_of_tiles(cpu_set, scheme, m):
    check(quantize(random(65, 40), scheme, 32), random(m, 40))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_through_the_rounding(scheme):
    weight = quantize(random(20, 40), scheme, 32)
    x = random(3, 40, requires_grad=True)
    direction = random(3, 20)
    (gradient,) = torch.autograd.grad(quant_matmul(x, weight, impl="native"), x, direction)
    truth = direction.double() @ weight.dequantize(torch.float64)
    assert_close_to_truth(gradient, direction @ weight.dequantize(), truth, reduction=20)
    assert not any(tensor.requires_grad for tensor in weight.tensors().values())


def test_gradients_of_gradients():
    weight = quantize(random(6, 10), "int8_a16")
    x = random(4, 10, requires_grad=True)

    def second(impl, x=x):
        y = quant_matmul(x, weight, activation="silu", impl=impl)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    truth = second("reference", x.detach().double().requires_grad_())
    # the reduction counts both differentiations, of 10 and 6 terms
    assert_close_to_truth(second("native"), second("reference"), truth, reduction=60**2)


def integer_weight(scheme, n, k, group):
    """Integer levels and scales of powers of 2: a product of integers has one right answer."""
    four_bit = not scheme.startswith("int8")
    groups = -(-k // group) if four_bit else 1
    codes = torch.randint(0, 16, (n, k)) if four_bit else torch.randint(1, 256, (n, k))
    zeros = torch.randint(0, 16, (n, groups)) if scheme.startswith("int4_asym") else None
    scales = 2.0 ** torch.randint(-2, 3, (n, groups)).float()
    return from_codes(codes.to(torch.uint8), scales, zeros, scheme, group)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.startswith("int")])
@pytest.mark.parametrize("group", [32, 128])
def test_integers_are_exact(cpu_set, scheme, group):
    weight = integer_weight(scheme, 67, 261, group)
    x = torch.randint(-127, 128, (14, 261)).float()
    x[:, ::32] = 127  # so that the scale of every group is 1
    truth = x.double() @ weight.dequantize(torch.float64).T
    assert torch.equal(quant_matmul(x, weight, impl="native").double(), truth)


def test_extreme_integers_do_not_saturate(cpu_set):
    codes = torch.zeros(3, 4096, dtype=torch.uint8)  # -128, which no rounding gives
    weight = from_codes(codes, torch.ones(3, 1), None, "int8", 128)
    x = torch.full((2, 4096), 127.0)
    x[1] = -127
    expected = torch.tensor([-1.0, 1.0])[:, None].expand(2, 3) * 127 * 128 * 4096
    assert torch.equal(quant_matmul(x, weight, impl="native"), expected)


def test_rounding_is_half_to_even(cpu_set):
    weight = quantize(torch.eye(6), "int8")
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    expected = torch.tensor([[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]])
    assert torch.equal(quant_matmul(x, weight, impl="native").round(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_to_e4m3(cpu_set, dtype):
    """By a weight that is 1: all finite codes, numbers between two of them, and what underflows."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    row = torch.cat((codes, -between, between * 1.01, -between * 0.99, codes[:9] / 1e3))
    k = row.numel()
    ones = from_codes(0x38 * torch.eye(k, dtype=torch.uint8), torch.ones(k, 1), None, "fp8", 128)
    x = torch.stack([row, row / 448, row * 1e30, row * 1e-37, random(k), torch.zeros(k)]).to(dtype)
    levels, scales = round_activations(x, "fp8", k)
    assert torch.equal(quant_matmul(x, ones, impl="native"), (levels * scales).to(dtype))
    assert torch.equal(levels[0].to(dtype), row.to(torch.float8_e4m3fn).to(dtype))


def test_the_definition_of_fp8():
    """One number after another, for scales of rows and of blocks."""
    x, weights = random(2, 150).bfloat16().float(), random(130, 150)
    for scheme, size in (("fp8", 150), ("fp8_block", 128)):
        weight = quantize(weights, scheme)
        y = quant_matmul(x.double(), weight, impl="reference")
        for row, column in ((0, 0), (1, 127), (1, 129)):
            total = 0.0
            for begin in range(0, 150, size):
                part = x[row, begin : begin + size]
                most = torch.full((1,), 448.0)
                inverse, scale = most / part.abs().max(), part.abs().max() / most
                levels = (part * inverse).to(torch.float8_e4m3fn).double()
                place = (column, 0) if scheme == "fp8" else (column // 128, begin // 128)
                codes = weight.packed[column, begin : begin + size].view(torch.float8_e4m3fn)
                products = levels * scale.double() * codes.double() * weight.scales[place].double()
                total += products.sum().item()
            assert y[row, column].item() == pytest.approx(total, rel=1e-12)


def test_blocks_take_the_reference():
    weight = quantize(random(130, 150), "fp8_block")
    assert "got fp8_block" in explain(quant_matmul, random(2, 150), weight)[0].reason
    x = random(2, 150, requires_grad=True)
    (gradient,) = torch.autograd.grad(quant_matmul(x, weight).sum(), x)
    expected = weight.dequantize().sum(0).expand(2, -1)
    assert_close_to_truth(gradient, expected, expected.double(), reduction=130)


def test_an_outlier_costs_its_group_alone(cpu_set):
    weight = quantize(random(40, 256), "int4", 32)
    x = random(9, 256)
    wild = x.clone()
    wild[:, 70] = 1e6
    quiet = [*range(64), *range(96, 256)]
    alone = torch.zeros_like(wild)
    alone[:, 64:96] = wild[:, 64:96]
    x[:, 64:96] = 0
    rest = quant_matmul(wild, weight, impl="native") - quant_matmul(alone, weight, impl="native")
    coarse = 1e6 * torch.finfo(torch.float32).eps * weight.dequantize()[:, quiet].abs().sum(1)
    assert bool(((rest - quant_matmul(x, weight, impl="native")).abs() <= coarse).all())


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_rows_that_are_zero_tiny_or_not_finite(cpu_set, scheme):
    weight = quantize(random(5, 40), scheme, 32)
    x = random(6, 40)
    x[0] = 0
    x[1] = 1e-38
    x[2, 3] = float("inf")
    x[3, 39] = float("nan")
    bias = random(5)
    y = quant_matmul(x, weight, bias, activation="relu", impl="native")
    assert torch.equal(y[0], bias.relu())
    assert bool(torch.isfinite(y[[0, 1, 4, 5]]).all())
    assert bool(torch.isnan(y[2:4]).all())
    assert torch.equal(torch.isnan(y), torch.isnan(reference.quant_matmul(x, weight, bias)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_depend_neither_on_threads_nor_on_batch(cpu_set, scheme):
    weight = quantize(random(200, 300), scheme, 64)
    x = random(270, 300)
    previous = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(quant_matmul(x, weight, impl="native"))
    torch.set_num_threads(previous)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][17], quant_matmul(x[17], weight, impl="native"))


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20), (20,), (2, 3, 20)], ids=str)
def test_leading_shapes(impl, shape):
    weight = quantize(random(7, 20), "int4")
    x = random(*shape, requires_grad=True)
    y = quant_matmul(x, weight, impl=impl)
    assert y.shape == (*shape[:-1], 7)
    y.sum().backward()
    assert x.grad.shape == shape


def test_strides_do_not_matter():
    weight = quantize(random(7, 20), "int8")
    x = random(20, 3, 5).permute(2, 1, 0)
    wide = random(5, 40)[:, ::2]
    for view in (x, wide, wide[:1].expand(4, 20)):
        expected = quant_matmul(view.contiguous(), weight, impl="native")
        assert torch.equal(quant_matmul(view, weight, impl="native"), expected)


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    m=st.integers(1, 20),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    group=st.sampled_from((32, 64, 128)),
    name=st.sampled_from(SETS),
)
def test_any_shape(scheme, m, n, k, group, name):
    _C.force_cpu(name)
    check(quantize(random(n, k), scheme, group), random(m, k), random(n))
    _C.force_cpu("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in FORMATS if name in SCHEMES])
def test_native_dequantize_is_the_definition(name, dtype):
    """The index and level functions that the CUDA kernel is made of, run on the CPU."""
    weight = quantize(random(9, 131), name, 64)
    parts = (weight.packed, weight.scales, weight.zero_points)
    ours = native.dequantize(*parts, name, weight.group_size, 9, 131, dtype)
    assert torch.equal(ours, weight.dequantize(dtype))


def operator_arguments(scheme):
    weight = quantize(random(10, 36), scheme, 32)
    x, bias = random(3, 36, requires_grad=True), random(10, requires_grad=True)
    parts = (weight.packed, weight.scales, weight.zero_points)
    residual = random(3, 10, requires_grad=True)
    return x, *parts, bias, residual, weight.scheme, weight.group_size, 10, "", False


@pytest.mark.parametrize("scheme", ["int8", "int4_asym_a16"])
def test_registered_operators(scheme):
    arguments = operator_arguments(scheme)
    torch.library.opcheck(torch.ops.llmos_fast.quant_matmul.default, arguments)
    parts = (*arguments[1:4], scheme, arguments[7], 10, 36, torch.bfloat16)
    torch.library.opcheck(torch.ops.llmos_fast.dequantize.default, parts)


@pytest.mark.parametrize("scheme", ["int8", "int4_asym", "nf4"])
def test_compiles_as_one_graph(scheme):
    weight = quantize(random(10, 36), scheme, 32)
    bias = random(10, requires_grad=True)

    def layer(x):
        return quant_matmul(x, weight, bias, activation="gelu")

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random(3, 36, requires_grad=True)
    eager, ours = layer(x), compiled(x)
    # the same kernel in another frame
    assert torch.equal(ours, eager)
    gradients = [torch.autograd.grad(y.sum(), (x, bias)) for y in (ours, eager)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 9])
def test_residual_is_added(cpu_set, m, dtype):
    weight = quantize(random(50, 77), "int4", 32)
    tensors = {"x": random(m, 77, dtype=dtype), "residual": random(m, 50, dtype=dtype)}
    for activation in (None, "gelu"):
        rest = {"qweight": weight, "activation": activation}
        for grads in (False, True):
            inputs = {name: t.clone().requires_grad_(grads) for name, t in tensors.items()}
            assert_within_budget(
                quant_matmul, reference.quant_matmul, inputs, rest, impl="native", reduction=77
            )


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4_asym", "nf4"])
@pytest.mark.parametrize(("m", "features", "k"), [(1, 16, 40), (3, 48, 70), (70, 80, 130)])
def test_gated_pair_in_one_call(cpu_set, scheme, m, features, k):
    gate, up = (quantize(random(features, k), scheme, 32) for _ in range(2))
    weight = interleave(gate, up)
    biases = random(2, features)
    both = biases.unflatten(1, (-1, 16)).transpose(0, 1).flatten()
    x, residual = random(m, k), random(m, features)

    def pair(x):
        first, second = (
            reference.quant_matmul(x, w, bias.to(x.dtype))
            for w, bias in zip((gate, up), biases, strict=True)
        )
        return apply_activation(first, "silu") * second + residual

    rest = {"activation": "silu", "gated": True}
    in_one = reference.quant_matmul(x, weight, both, residual=residual, **rest)
    assert_close_to_truth(in_one, pair(x), pair(x.double()), reduction=k)
    for grads in (False, True):
        tensors = {"x": x, "bias": both, "residual": residual}
        tensors = {name: t.clone().requires_grad_(grads) for name, t in tensors.items()}
        assert_within_budget(
            quant_matmul,
            reference.quant_matmul,
            tensors,
            {"qweight": weight, **rest},
            impl="native",
            reduction=k,
        )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("scheme", "n"), [("fp8", 16), ("fp8", 33), ("fp8_a16", 33), ("fp8_block", 128)]
)
def test_gated_pairs_in_rows(scheme, n, requires_grad):
    """fp8 has no panels: the halves are the gate and its partner. The kernels gate only panels."""
    gate, up = (quantize(random(n, 70), scheme) for _ in range(2))
    weight, biases = interleave(gate, up), random(2, n)
    x, residual = random(3, 70), random(3, n)
    first, second = (
        reference.quant_matmul(x.double(), w, bias.double())
        for w, bias in zip((gate, up), biases, strict=True)
    )
    tensors = {"x": x, "bias": biases.flatten(), "residual": residual}
    rest = {"qweight": weight, "activation": "silu", "gated": True}
    truth = reference.quant_matmul(**{name: t.double() for name, t in tensors.items()}, **rest)
    torch.testing.assert_close(truth, apply_activation(first, "silu") * second + residual)
    assert_within_budget(
        quant_matmul,
        reference.quant_matmul,
        {name: t.requires_grad_(requires_grad) for name, t in tensors.items()},
        rest,
        impl="reference" if scheme == "fp8_block" else "native",
        reduction=70,
    )


def test_interleave_refuses_what_does_not_fit():
    weight = quantize(random(16, 40), "int4", 32)
    with pytest.raises(ValueError, match=r"interleave: .* be alike.*groups of 32 and .*of 64"):
        interleave(weight, quantize(random(16, 40), "int4", 64))
    with pytest.raises(
        ValueError, match=r"interleave: .* multiple of 16 rows, got int4 \(17, 40\)"
    ):
        interleave(*[quantize(random(17, 40), "int4", 32)] * 2)


def test_other_devices_are_refused_with_a_sentence():
    weight = quantize(random(4, 8), "int8").to("meta")
    with pytest.raises(ValueError, match="needs a CPU or CUDA tensor, got meta"):
        quant_matmul(random(2, 8).to("meta"), weight, impl="native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where CUDA fails")
def test_cuda_errors_name_the_kernel_and_the_shape():
    cuda = pytest.importorskip("llmos_fast._CUDA", reason="the CUDA extension was not built")
    with pytest.raises(RuntimeError, match=r"CUDA kernel dequantize of a \(3, 5\) weight: "):
        cuda.dequantize(0, 0, 0, 0, 0, 3, 5, 32, 1, "bfloat16", 0)
    with pytest.raises(ValueError, match=r"dtype must be .*, got float64"):
        cuda.dequantize(0, 0, 0, 0, 0, 3, 5, 32, 1, "float64", 0)


def test_float64_takes_the_reference():
    weight = quantize(random(4, 8), "int8")
    refusals = dispatch.explain(quant_matmul, random(2, 8).double(), weight)
    assert [r.implementation for r in refusals if r.reason is None] == ["reference"]
    with pytest.raises(ValueError, match=r"quant_matmul\(impl='native'\).*float64"):
        quant_matmul(random(2, 8).double(), weight, impl="native")
    assert quant_matmul(random(2, 8).double(), weight).dtype == torch.float64


WEIGHT = quantize(torch.ones(4, 64), "int4", 32)
ODD_FP8 = quantize(torch.ones(3, 64), "fp8")
X = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("x", "weight", "rest", "message"),
    [
        (X.int(), WEIGHT, {}, "x must be float32, .*, got torch.int32"),
        (torch.ones(2, 63), WEIGHT, {}, r"x must have 64 .*, got \(2, 63\)"),
        (torch.tensor(1.0), WEIGHT, {}, r"x must have 64 .*, got \(\)"),
        (X.to("meta"), WEIGHT, {}, "x must be on qweight's device cpu, got meta"),
        (X, torch.ones(4, 64), {}, "qweight must be a QuantizedWeight, got Tensor"),
        (X, WEIGHT, {"bias": torch.ones(5)}, r"bias must have shape \(4,\), got \(5,\)"),
        (X, WEIGHT, {"bias": torch.ones(4).half()}, "bias must be .*, got torch.float16"),
        (X, WEIGHT, {"bias": torch.ones(4, device="meta")}, "bias must be on .* got meta"),
        (X, WEIGHT, {"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
        (X, WEIGHT, {"gated": True}, r"qweight must be interleave\(gate, up\) for gated=True"),
        (X, ODD_FP8, {"gated": True}, r"qweight must be interleave\(gate, up\) for gated=True"),
        (X, WEIGHT, {"residual": torch.ones(2, 5)}, r"residual must have shape \(2, 4\)"),
        (X, WEIGHT, {"residual": torch.ones(2, 4).half()}, "residual must be torch.float32"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_input_is_refused(x, weight, rest, message):
    with pytest.raises(ValueError, match=f"quant_matmul: {message}"):
        quant_matmul(x, weight, **rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 48}, "group_size must be 32, 64 or 128 for int4, got 48"),
        ({"group_size": 64}, r"scales must be torch.bfloat16 \(1, 1, 16\)"),
        ({"scales": torch.ones(1, 2, 16)}, "scales must be torch.bfloat16"),
        ({"packed": torch.ones(1, 8, 16, 4)}, "packed must be torch.uint8"),
        ({"packed": WEIGHT.packed.to("meta")}, "scales must be .* on meta, got .* on cpu"),
        ({"packed": WEIGHT.packed.mT.contiguous().mT}, "packed must be contiguous, got strides"),
        ({"zero_points": torch.ones(1, 2, 16)}, "zero_points must be given for int4_asym"),
        ({"scheme": "int8"}, r"group_size must be 64 \(whole rows\) for int8"),
        ({"shape": (40, 64)}, r"packed must be torch.uint8 \(3, 8, 16, 4\)"),
        ({"scheme": "int5"}, "scheme must be one of"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"(QuantizedWeight|quantize): {message}"):
        dataclasses.replace(WEIGHT, **changes)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scales_that_are_not_finite_are_refused(value):
    scales = WEIGHT.scales.clone()
    scales[0, :, 0] = value
    with pytest.raises(ValueError, match=r"QuantizedWeight: scales must be finite, got 2 of inf"):
        dataclasses.replace(WEIGHT, scales=scales).check_values()


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4_asym", "nf4"])
def test_scales_of_any_size_give_what_arithmetic_gives(cpu_set, scheme):
    weight = quantize(random(40, 70), scheme, 32)
    x = random(11, 70)
    for value in (0.0, -0.5, 1e-38, 1e30, float("inf"), float("nan")):
        scales = weight.scales.clone()
        scales[0, 0, :3] = value
        changed = dataclasses.replace(weight, scales=scales)
        ours = quant_matmul(x, changed, impl="native")
        expected = reference.quant_matmul(x, changed)
        assert torch.equal(ours[:, 3:], quant_matmul(x, weight, impl="native")[:, 3:])
        assert torch.equal(torch.isfinite(ours[:, :3]), torch.isfinite(expected[:, :3]))


def test_memory_that_is_misaligned_or_shared(cpu_set):
    weight = quantize(random(50, 70), "int4_asym", 32)
    shifted = {
        name: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
        for name, t in weight.tensors().items()
    }
    x = torch.empty(1 + 12 * 75)[1:].view(12, 75).copy_(random(12, 75))[:, 2:72]
    moved = dataclasses.replace(weight, **shifted)
    expected = quant_matmul(x.contiguous(), weight, impl="native")
    assert torch.equal(quant_matmul(x, moved, impl="native"), expected)
    square = quantize(random(70, 70), "int8")
    expected = quant_matmul(x.clone(), square, residual=x.clone(), impl="native")
    assert torch.equal(quant_matmul(x, square, residual=x, impl="native"), expected)


def test_transforms_go_to_the_reference():
    weight = quantize(random(7, 20), "int8")
    x = random(3, 5, 20)
    mapped = torch.func.vmap(lambda rows: quant_matmul(rows, weight))(x)
    assert_close_to_truth(mapped, mapped, quant_matmul(x, weight).double(), reduction=20)


@pytest.mark.parametrize("scheme", ["int4", "int4_asym"])
def test_sums_of_groups_have_no_longest_row(scheme):
    """int8 sums a whole row in int32; 4-bit schemes one group."""
    k = 2**17 + 64
    x, weight = torch.full((1, k), 127.0), quantize(torch.full((16, k), 1.0), scheme, 32, "absmax")
    assert explain(quant_matmul, x, weight)[0] == ("native", None)
    out, exact = quant_matmul(x, weight), 127.0 * weight.dequantize()[0].double().sum()
    assert (out.double() - exact).abs().max() <= k**0.5 * torch.finfo(torch.float32).eps * exact
    narrow = quantize(torch.ones(16, k), "int8")
    assert "needs K <= 131072" in explain(quant_matmul, x, narrow)[0].reason


@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * 2**30,
    reason="NOT TESTED: needs 8 GiB of free memory",
)
def test_more_weights_than_int32_counts():
    k, panels = 2**16, 2**11 + 2
    one = torch.randint(1, 256, (1, k // 4, 16, 4), dtype=torch.uint8)
    # the panels' codes are the same, their scales are not
    packed = one.expand(panels, -1, -1, -1).contiguous()
    scales = torch.rand(panels, 1, 16) + 0.5
    weight = QuantizedWeight(packed, scales, None, "int8", k, (16 * panels, k))
    assert packed.numel() > 2**31
    x = random(3, k)
    last = QuantizedWeight(packed[-2:], scales[-2:], None, "int8", k, (32, k))
    assert torch.equal(quant_matmul(x, weight)[:, -32:], quant_matmul(x, last))
    ids = torch.tensor([16 * panels - 1, 16 * panels - 32])
    rows = ops.quant_embedding(ids, weight)
    assert torch.equal(rows, last.dequantize()[[31, 0]])
