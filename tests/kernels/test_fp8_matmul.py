"""quant_matmul in fp8 on the GPU kernels: rounding of x, both kinds of scales, the self-test.

The interpreter multiplies in fp32: that sums of tensor cores are short is seen by the compile gate.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmos_fast.kernels import fp8_self_test, verdicts
from llmos_fast.kernels.fp8_matmul import fp8_matmul
from llmos_fast.kernels.fp8_matmul_jobs import sums_rule
from llmos_fast.kernels.fp8_rounding import RoundingLaunch, round_to_fp8
from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.offline import Compiled
from llmos_fast.kernels.product_launch import ProductLaunch
from llmos_fast.kernels.small_product import SmallLaunch

from llmos_fast import ops, reference
from llmos_fast.ops.quant_matmul import ACTIVATIONS
from llmos_fast.quantize import from_codes, interleave, pair_multiple, quantize
from llmos_fast.reference.quant_matmul import finish, round_activations
from llmos_fast.testing import assert_within_budget, random

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES = ["fp8", "fp8_block"]


def check(x, weight, bias=None, residual=None, activation=None, gated=False):
    assert_within_budget(
        partial(ops.quant_matmul, qweight=weight),
        partial(reference.quant_matmul, qweight=weight),
        {"x": x, "bias": bias, "residual": residual},
        {"activation": activation, "gated": gated},
        impl="triton",
        reduction=x.shape[-1],
    )


def uneven(n, k, scheme, largest=3):
    """A weight whose scales differ by orders of magnitude from row to row, or block to block."""
    weight = quantize(random(n, k), scheme)
    weight.scales.mul_(10.0 ** torch.randint(-3, largest + 1, weight.scales.shape))
    return weight


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [(), (0,), (9,), (2, 35)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (33, 50), (140, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(scheme, rows, sizes, dtype):
    n, k = sizes
    check(random(*rows, k, dtype=dtype), quantize(random(n, k), scheme), random(n, dtype=dtype))


@settings(max_examples=12, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    m=st.integers(1, 80),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(scheme, m, n, k, dtype):
    check(random(m, k, dtype=dtype), uneven(n, k, scheme), random(n), random(m, n, dtype=dtype))


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_epilogue(scheme, rows, activation):
    x, residual = random(rows, 40, dtype=torch.bfloat16), random(33, rows, dtype=torch.bfloat16).T
    check(x, quantize(random(33, 40), scheme), random(33), residual, activation)


def pair_of(n, k, scheme):
    """For ``n`` columns, or as many more as blocks need; their products are numbers of fp16."""
    n += -n % pair_multiple(scheme)
    return interleave(*(uneven(n, k, scheme, largest=0) for _ in range(2)))


@settings(max_examples=8, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    m=st.integers(1, 80),
    n=st.integers(1, 80),
    k=st.integers(1, 200),
    extras=st.sampled_from([(), ("bias",), ("residual",), ("bias", "residual")]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_pair(scheme, m, n, k, extras, dtype):
    weight = pair_of(n, k, scheme)
    both = weight.shape[0]
    tensors = {"bias": random(both), "residual": random(m, both // 2, dtype=dtype)}
    tensors = {name: tensors[name] for name in extras}
    check(random(m, k, dtype=dtype), weight, **tensors, activation="silu", gated=True)


@pytest.mark.parametrize("rows", [9, 70])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_of_a_gate(rows, activation):
    x = random(2, rows, 40, dtype=torch.bfloat16)
    check(x, pair_of(33, 40, "fp8"), random(66), random(2, rows, 33).bfloat16(), activation, True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [5, 66])
def test_scales_stay_where_they_belong(scheme, rows):
    """Each part of x meets its own scale: columns and blocks are multiplied one by one."""
    weight = uneven(140, 300, scheme)
    x = random(rows, 300) * 10.0 ** torch.randint(-3, 4, (rows, 1))
    for begin in (0, 128, 256):
        part = torch.zeros_like(x)
        part[:, begin : begin + 128] = x[:, begin : begin + 128] * 10.0 ** (begin // 128)
        ours = ops.quant_matmul(part, weight, impl="triton").double()
        truth = reference.quant_matmul(part.double(), weight)
        for row, true_row in zip(ours, truth, strict=True):
            for mine, true in zip(row.split(128), true_row.split(128), strict=True):
                assert (mine - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_tiles(scheme, dtype):
    x, weight = random(70, 160, dtype=dtype), uneven(144, 160, scheme)
    for tiles in ((32, 128, 128, 4, 1, 64), (16, 64, 64, 4, 1, 64)):
        with forced(product=ProductLaunch(*tiles, TMA=True)):
            check(x, weight, random(144))
    with forced(small_product=SmallLaunch(16, 128, 128, 4, 1)):
        check(x[:20], weight, random(144))
    with forced(round_groups=RoundingLaunch(4, 32, 4)):
        check(x, weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_tiles_of_pairs(scheme):
    """Both halves of a tile by the copy engine, one column that it leaves out, parts of K."""
    x, weight = random(70, 272), pair_of(150, 272, scheme)
    n = weight.shape[0]
    with forced(product=ProductLaunch(32, 64, 128, 4, 1, 32, TMA=True)):
        check(x, weight, random(n), activation="gelu", gated=True)
    with forced(small_product=SmallLaunch(16, 64, 128, 4, 1)):
        check(x[:9], weight, random(n), activation="gelu", gated=True)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's: infinite rows
@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 20),
    k=st.integers(1, 300),
    in_blocks=st.booleans(),
    exponent=st.integers(-44, 37),
    dtype=st.sampled_from(DTYPES),
)
def test_rounding_is_the_definition(m, k, in_blocks, exponent, dtype):
    group = 128 if in_blocks else k
    spread = torch.randn(m, k) * torch.tensor(10.0) ** torch.randint(-6, 1, (m, k))
    x = (spread * 10.0**exponent).to(dtype)
    found, scales = round_to_fp8(x, group)
    levels, expected = round_activations(x, "fp8", group)
    assert torch.equal(found.float().nan_to_num(1e3), levels.nan_to_num(1e3))
    spread_out = scales.T.repeat_interleave(group, dim=1)[:, :k]
    finite = torch.isfinite(expected)
    assert torch.equal(spread_out[finite], expected[finite])


def test_half_way_goes_to_even():
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, -between))[None]
    levels, scales = round_to_fp8(x, x.shape[1])
    assert scales.item() == 1
    assert torch.equal(levels, x.to(torch.float8_e4m3fn))


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's
@pytest.mark.parametrize("rows", [6, 70])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_are_zero_tiny_or_not_finite(scheme, rows):
    weight, bias = quantize(random(40, 150), scheme), random(40)
    x = random(rows, 150)
    x[0], x[1], x[4], x[5] = 0, 1e-38, 1e36 * x[4].sign(), 1e-30
    x[2, 3], x[3, 149] = float("inf"), float("nan")
    y = ops.quant_matmul(x, weight, bias, activation="relu", impl="triton")
    assert torch.equal(y[0], bias.relu())
    assert bool(torch.isnan(y[2:4]).all())
    assert bool(torch.isfinite(y[[0, 1, 4, 5]]).all())
    kept = torch.ones(rows, dtype=torch.bool).index_fill_(0, torch.tensor([2, 3]), False)
    check(x[4:5], weight)
    check(x[kept][:2], weight)
    check(x[kept][3:], weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strides_do_not_matter(scheme):
    weight = quantize(random(40, 150), scheme)
    for x in (random(150, 9).T, random(9, 300)[:, ::2], random(1, 150).expand(70, 150)):
        expected = ops.quant_matmul(x.contiguous(), weight, impl="triton")
        assert torch.equal(ops.quant_matmul(x, weight, impl="triton"), expected)


def arguments(scheme, m=3):
    weight = quantize(random(40, 150), scheme)
    tensors = (weight.packed, weight.scales, random(40), random(m, 40))
    return random(m, 150), *tensors, scheme == "fp8_block", "gelu", False


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme):
    torch.library.opcheck(torch.ops.llmos_fast.fp8_matmul_triton.default, arguments(scheme))


@pytest.mark.parametrize(("scheme", "gated"), [("fp8", True), ("fp8_block", False)])
def test_compiles_in_one_graph(scheme, gated):
    torch._dynamo.reset()
    weight = pair_of(20, 150, scheme) if gated else quantize(random(40, 150), scheme)
    call = partial(ops.quant_matmul, qweight=weight, gated=gated, impl="triton")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (3, 70):
        x = random(rows, 150)
        assert torch.equal(compiled(x), call(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_refused(scheme):
    weight = quantize(random(4, 8), scheme)
    with pytest.raises(ValueError, match="computes no gradients"):
        ops.quant_matmul(random(2, 8, requires_grad=True), weight, impl="triton")
    residual = random(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="computes no gradients"):
        ops.quant_matmul(random(2, 8), weight, residual=residual, impl="triton")
    with pytest.raises(ValueError, match=r"got fp8_block_a16"):
        ops.quant_matmul(random(2, 8), quantize(random(4, 8), "fp8_block_a16"), impl="triton")


# of the self-test; its own sizes are for a GPU
SMALL = ((70, 48, 528), (5, 144, 300), (5, 33, 1001))
SMALL_PAIRS = ((70, 48, 272), (5, 77, 333))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_self_test_passes_what_is_right(blocks, dtype):
    assert fp8_self_test.passes(fp8_matmul, CPU, blocks, dtype, False, SMALL, 1)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_self_test_passes_right_pairs(blocks):
    assert fp8_self_test.passes(fp8_matmul, CPU, blocks, torch.float16, True, SMALL_PAIRS, 1)


def by_definition(x, packed, scales, bias, residual, blocks, activation, gated, sum_up=None):
    """``fp8_matmul`` by plain torch in float64."""
    k = x.shape[1]
    weight = from_codes(packed, scales, None, "fp8_block" if blocks else "fp8", 128)
    levels, x_scales = round_activations(x, weight.scheme, weight.group_size)
    values, dense = levels.double() * x_scales.double(), weight.dequantize(torch.float64)
    y = values @ dense.T if sum_up is None else sum_up(values, dense, k)
    return finish(y + bias.double(), activation, gated, residual, len(packed) // 2).to(x.dtype)


def in_14_bits(x, weight, k):
    """Sums as Hopper's tensor cores keep them, 32 products at a time, never added in fp32."""
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for begin in range(0, k, 32):
        total += x[:, begin : begin + 32] @ weight[:, begin : begin + 32].T
        mantissa, exponent = torch.frexp(total)
        total = torch.ldexp((mantissa * 2**14).trunc() / 2**14, exponent)
    return total


def with_scales(change):
    return lambda x, packed, scales, *rest: fp8_matmul(x, packed, change(scales), *rest)


WRONG = {
    "a tail is dropped": lambda x, packed, *rest: fp8_matmul(
        torch.cat((x[:, :-1], torch.zeros_like(x[:, -1:])), 1), packed, *rest
    ),
    "scales are shifted": with_scales(lambda scales: scales.roll(1, 0)),
    "scales are in the wrong order": with_scales(lambda scales: scales.flip(0)),
    "sums are not added in fp32": partial(by_definition, sum_up=in_14_bits),
}


def halves_of(change):
    """``by_definition`` with gate and partner as they should not be."""

    def multiply(x, packed, scales, bias, residual, blocks, activation, gated):
        y = by_definition(x.double(), packed, scales, bias, None, blocks, None, False)
        return change(*y.chunk(2, -1)).to(x.dtype)

    return multiply


WRONG_PAIRS = {
    "gate and partner are swapped": halves_of(lambda gate, up: up.relu() * gate),
    "nothing is activated": halves_of(lambda gate, up: gate * up),
    "both are activated": halves_of(lambda gate, up: gate.relu() * up.relu()),
    "the gate is missing": halves_of(lambda gate, up: gate.relu()),
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_self_test_finds_what_is_wrong(wrong, blocks):
    sizes = ((5, 144, 32784),) if wrong.startswith("sums") else ((5, 144, 300),)
    assert fp8_self_test.passes(by_definition, CPU, blocks, torch.float32, False, sizes, 1)
    assert not fp8_self_test.passes(WRONG[wrong], CPU, blocks, torch.float32, False, sizes, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_self_test_finds_wrong_pairs(blocks, dtype):
    passes = partial(fp8_self_test.passes, sizes=((5, 144, 300),), rounds=1)
    assert passes(by_definition, CPU, blocks, dtype, True)
    for name, wrong in WRONG_PAIRS.items():
        assert not passes(wrong, CPU, blocks, dtype, True), name


@pytest.mark.parametrize("right", [True, False])
def test_a_verdict_is_kept_and_obeyed(monkeypatch, right):
    kept, asked = {}, []

    def passes(*call):
        asked.append(call)
        return right

    monkeypatch.setattr(verdicts, "INTERPRETED", False)
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setattr(fp8_self_test, "passes", passes)
    monkeypatch.setattr(verdicts, "load", lambda device: dict(kept))
    monkeypatch.setattr(verdicts, "store", lambda device, found: kept.update(found))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    call = partial(ops.quant_matmul, random(2, 8), quantize(random(4, 8), "fp8"), impl="triton")
    for again in range(2):
        monkeypatch.setattr(verdicts, "_verdicts", {})
        if right:
            call()
        else:
            with (
                pytest.warns(UserWarning, match=r"fp8_matmul\(rows, torch.float32\) fails its"),
                pytest.raises(ValueError, match="fails its self-test as ptxas"),
            ):
                call()
        assert len(asked) == 1, again
    assert kept == {"fp8_matmul(rows, torch.float32)": right}
    # the operator, which a compiled graph calls without asking, asks itself
    x, weight = random(2, 8), quantize(random(4, 8), "fp8")
    parts = weight.packed, weight.scales, None, None, False, "", False
    found = torch.ops.llmos_fast.fp8_matmul_triton(x, *parts)
    torch.testing.assert_close(found, reference.quant_matmul(x, weight))


def test_nothing_is_tested_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(verdicts, "INTERPRETED", False)
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setattr(verdicts, "load", lambda device: {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    reason = fp8_self_test.refusal(CPU, False, torch.float32, False)
    assert reason == "needs a first call outside of a CUDA graph, for its self-test"


def test_the_gate_refuses_long_sums():
    def of(wgmma, sums):
        return all(sums_rule(Compiled("", 0, 0, 0, wgmma, 0, 0, 0, sums)).values())

    assert of(4, 1)
    assert of(8, 2)
    assert of(0, 0)
    assert not of(4, 0)
    assert not of(8, 1)
