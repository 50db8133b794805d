"""The own product of csrc/cpu/product.inl: borders of its blocks, layouts, threads, epilogues."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast.native.activation import activation_backward, activation_forward
from llmos_fast.native.product import product, product_into
from llmos_fast.native.product_activated import product_activated, product_gradients
from llmos_fast.testing import assert_close_to_truth, random

SETS = ["avx512_bf16", "avx512", "avx2", "generic"]
every_set = pytest.mark.parametrize("cpu_set", SETS, indirect=True)


@pytest.fixture(autouse=True)
def own(products_by):
    """More than a few rows go to the own kernel, whatever this CPU prefers."""
    products_by("own")


def laid_out(values, layout):
    """The same values with rows, columns or neither of them contiguous, NaN around them."""
    if layout == "columns":
        return laid_out(values.t(), "rows").t()
    step = 2 if layout == "neither" else 1
    rows, columns = values.shape
    wide = torch.full((rows + 2, step * columns + 40), torch.nan, dtype=values.dtype)
    inside = wide[1:-1, 3 : 3 + step * columns : step]
    inside.copy_(values)
    return inside


def check(x, weight, bias):
    truth = x.double() @ weight.double().t()
    eager = x @ weight.t()
    if bias is not None:
        truth, eager = truth + bias.double(), eager + bias
    assert_close_to_truth(product(x, weight, bias), eager, truth, reduction=max(x.shape[1], 1))


@every_set
@pytest.mark.parametrize("bias", [True, False])
def test_borders_of_tiles_and_panels(cpu_set, bias, dtype):
    for rows, columns, depth in itertools.product((17, 24, 30, 97), (1, 16, 31, 33, 70), (1, 2, 9)):
        x, weight = random(rows, depth, dtype=dtype), random(columns, depth, dtype=dtype)
        check(x, weight, random(columns, dtype=dtype) if bias else None)


# the depth passes a part of 384 and pairs of it; the columns and the depth what is packed at a time
@every_set
@pytest.mark.parametrize("sizes", [(100, 70, 385), (40, 40, 769), (18, 1100, 4300)], ids=str)
def test_parts_of_the_depth(cpu_set, sizes, dtype):
    rows, columns, depth = sizes
    x, weight = random(rows, depth, dtype=dtype), random(columns, depth, dtype=dtype)
    check(x, weight, random(columns, dtype=dtype))


@every_set
@pytest.mark.parametrize("x_layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("weight_layout", ["rows", "columns", "neither"])
def test_layouts(cpu_set, x_layout, weight_layout, dtype):
    x, weight = random(50, 45, dtype=dtype), random(70, 45, dtype=dtype)
    dense = product(x, weight, None)
    assert torch.equal(product(laid_out(x, x_layout), laid_out(weight, weight_layout), None), dense)


@every_set
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("sizes", [(50, 70, 45), (30, 40, 801), (18, 1100, 31)], ids=str)
def test_fp32_weights_beside_bf16(cpu_set, sizes, layout):
    rows, columns, depth = sizes
    x, bias = random(rows, depth, dtype=torch.bfloat16), random(columns, dtype=torch.bfloat16)
    weight = random(columns, depth)
    mixed = product(x, laid_out(weight, layout), bias)
    if cpu_set == "avx512_bf16":  # rounded as they are packed, else not at all
        assert torch.equal(mixed, product(x, weight.bfloat16(), bias))
    truth = x.double() @ weight.double().t() + bias.double()
    eager = x @ weight.bfloat16().t() + bias
    assert mixed.dtype == torch.bfloat16
    assert_close_to_truth(mixed, eager, truth, reduction=depth)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(st.integers(17, 250), st.integers(1, 250), st.integers(1, 900)),
    layouts=st.tuples(*[st.sampled_from(["rows", "columns", "neither"])] * 2),
)
def test_any_size(sizes, layouts):
    rows, columns, depth = sizes
    x, weight = random(rows, depth), random(columns, depth)
    check(laid_out(x, layouts[0]), laid_out(weight, layouts[1]), None)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_set
@pytest.mark.parametrize("sizes", [(200, 300, 500), (30, 2000, 100), (40, 1100, 2500)], ids=str)
def test_depends_neither_on_threads_nor_on_other_rows(cpu_set, sizes, dtype, threads):
    rows, columns, depth = sizes
    x, weight = random(rows, depth, dtype=dtype), random(columns, depth, dtype=dtype)
    threads(1)
    one = product(x, weight, None)
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(product(x, weight, None), one)
    assert torch.equal(product(x[3:25], weight, None), one[3:25])


@every_set
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
def test_activated(cpu_set, activation, gated, dtype):
    """Bit for bit what a product and then the activation give, dropout included."""
    x, weight, bias = (random(*s, dtype=dtype) for s in ((41, 60), (600, 60), (600,)))
    gate = random(41, 600, dtype=dtype) if gated else None
    bias, seed = bias.repeat_interleave(2)[::2], torch.tensor([5])
    for p, keep in ((0.0, False), (0.3, True)):
        call = (activation, p, seed if p else None)
        hidden, kept = product_activated(x, weight, bias, gate, *call, keep)
        sums = product(x, weight, bias)
        pair = (sums, None) if gate is None else (gate, sums)
        assert torch.equal(hidden, activation_forward(*pair, *call))
        assert torch.equal(kept, sums) if keep else kept.numel() == 0


@every_set
@pytest.mark.parametrize("gated", [False, True])
def test_gradients(cpu_set, gated, dtype):
    """Bit for bit likewise in fp32; in bf16 the gradient of hidden is not rounded on its way."""
    d_out, weight = random(41, 60, dtype=dtype), random(60, 600, dtype=dtype)
    gate = random(41, 600, dtype=dtype)
    up = random(41, 600, dtype=dtype) if gated else None
    call = ("gelu", 0.3, torch.tensor([5]))
    fused = product_gradients(d_out, weight, gate, up, *call)
    d_hidden = product(d_out, weight.t(), None)
    apart = activation_backward(gate, up, d_hidden, *call)
    wide = (None if t is None else t.float() for t in (gate, up, d_out.double() @ weight.double()))
    truths = activation_backward(*wide, *call)
    for ours, other, truth in zip(fused, apart, truths, strict=True):
        if other is None:
            assert ours is None
        elif dtype == torch.float32:
            assert torch.equal(ours, other)
        else:
            assert_close_to_truth(ours, other, truth.double(), reduction=60)
    assert torch.equal(fused[2], apart[2])


@every_set
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize("sizes", [(50, 70, 45), (113, 40, 900), (30, 1100, 2000)], ids=str)
def test_into_fp32_with_row_sums(cpu_set, sizes, layout, add, dtype):
    rows, columns, depth = sizes
    x, weight = random(rows, depth, dtype=dtype), random(columns, depth, dtype=dtype)
    before, before_sums = random(rows, columns), random(rows)
    out, sums = (before, before_sums) if add else (before * torch.nan, before_sums * torch.nan)
    out, sums = out.clone(), sums.clone()
    product_into(out, laid_out(x, layout), weight, sums, add=add)
    truth, truth_sums = x.double() @ weight.double().t(), x.double().sum(1)
    if add:
        truth, truth_sums = truth + before, truth_sums + before_sums
    assert_close_to_truth(out, truth.float(), truth, reduction=depth)
    assert_close_to_truth(sums, truth_sums.float(), truth_sums, reduction=depth)


@every_set
def test_row_sums_depend_on_no_thread(cpu_set, dtype, threads):
    x, weight = random(900, 400, dtype=dtype).t(), random(1500, 900, dtype=dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        out, sums = torch.empty(400, 1500), torch.empty(400)
        product_into(out, x, weight, sums, add=False)
        found.append((out, sums))
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(found[0], pair, strict=True))
