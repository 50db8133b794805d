"""linear against its definition, and the products behind it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import _C, ops, reference
from llmos_fast.native import product
from llmos_fast.testing import assert_close_to_truth, assert_within_budget, random


@pytest.fixture(params=product.ROUTES)
def route(request, products_by):
    """Everyone who can multiply, whatever this CPU prefers."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    products_by(request.param)
    return request.param


def check(rows, features, out, bias, dtype):
    grad = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "x": random(*rows, features, **grad),
        "weight": random(out, features, **grad),
        "bias": random(out, **grad) if bias else None,
    }
    reduction = max(features, out, torch.Size(rows).numel(), 1)
    assert_within_budget(
        ops.linear, reference.linear, tensors, {}, impl="native", reduction=reduction
    )


@pytest.mark.parametrize("rows", [(1,), (3, 5), (), (17,), (3, 20)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_matches_definition(route, rows, bias, dtype):
    check(rows, 33, 70, bias, dtype)


@pytest.mark.parametrize("rows", [(5,), (3, 20), (160,)], ids=str)
def test_fp32_weight_beside_bf16(route, rows):
    """Counts as rounded, and gets an fp32 gradient that was never rounded to bf16."""
    x = random(*rows, 144, dtype=torch.bfloat16, requires_grad=True)
    bias = random(512, dtype=torch.bfloat16, requires_grad=True)
    tensors = {"x": x, "weight": random(512, 144, requires_grad=True), "bias": bias}
    assert_within_budget(ops.linear, reference.linear, tensors, {}, impl="native", reduction=512)
    ops.linear(**tensors, impl="native").sum().backward()
    gradient = tensors["weight"].grad
    assert gradient.dtype == torch.float32
    if route == "own" and len(rows) == 1 and rows[0] > 100:
        assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize(
    "sizes", [(0, 8, 4), (5, 0, 4), (5, 8, 0), (40, 0, 4), (40, 8, 0)], ids=str
)
def test_empty(route, sizes):
    rows, features, out = sizes
    check((rows,), features, out, True, torch.float32)


@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 300)] * 3), bias=st.booleans())
def test_any_size(sizes, bias):
    rows, features, out = sizes
    check((rows,), features, out, bias, torch.float32)


def test_strided_operands(route):
    x, weight = random(33, 9).t(), random(33, 20).t()
    dense = ops.linear(x.contiguous(), weight.contiguous(), impl="native")
    torch.testing.assert_close(ops.linear(x, weight, impl="native"), dense)


def test_follows_a_weight_that_changes_in_place(route):
    """Nothing that was packed from an old weight may survive, however it was written."""
    x, weight = random(40, 64), random(48, 64)
    with torch.no_grad():
        for change in (
            lambda: weight.add_(1.0),
            lambda: weight.data.mul_(0.5),
            lambda: weight.numpy().fill(2.0),
        ):
            ops.linear(x, weight, impl="native")
            change()
            torch.testing.assert_close(ops.linear(x, weight, impl="native"), x @ weight.t())


every_set = pytest.mark.parametrize(
    "cpu_set", ["avx512_bf16", "avx512", "avx2", "generic"], indirect=True
)
FEW = product._FEW_ROWS


def inside(values):
    """The same values as part of a wider matrix, NaN around them."""
    wide = torch.full((len(values) + 2, values.shape[1] + 5), torch.nan, dtype=values.dtype)
    wide[1:-1, 3:-2] = values
    return wide[1:-1, 3:-2]


@every_set
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows(cpu_set, bias, dtype):
    for m, features, out in itertools.product(range(1, FEW + 2), (1, 7, 17, 129), (1, 3, 5, 50)):
        x, weight = inside(random(m, features, dtype=dtype)), random(out, features, dtype=dtype)
        offset = random(out, dtype=dtype) if bias else None
        ours = ops.linear(x, inside(weight), offset, impl="native")
        truth = reference.linear(*(t if t is None else t.double() for t in (x, weight, offset)))
        eager = reference.linear(x, weight, offset)
        assert_close_to_truth(
            ours, eager, truth, reduction=features, name=f"{m} x {features} x {out}"
        )


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("strided", ["x", "weight", "bias"])
def test_strided(route, strided, rows, dtype):
    tensors = {
        "x": random(rows, 40, dtype=dtype),
        "weight": random(10, 40, dtype=dtype),
        "bias": random(10, dtype=dtype),
    }
    truth = reference.linear(**{name: tensor.double() for name, tensor in tensors.items()})
    eager = reference.linear(**tensors)
    tensors[strided] = tensors[strided].repeat_interleave(2, -1)[..., ::2]
    ours = ops.linear(**tensors, impl="native")
    assert_close_to_truth(ours, eager, truth, reduction=40)


@every_set
@pytest.mark.parametrize("out", [5, 700])
def test_few_rows_depend_neither_on_threads_nor_on_one_another(cpu_set, out, dtype):
    x, weight = random(FEW, 150, dtype=dtype), random(out, 150, dtype=dtype)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.linear(x, weight, impl="native"))
    torch.set_num_threads(threads)
    results.append(torch.cat([ops.linear(row, weight, impl="native") for row in x.split(1)]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_refuses_an_unknown_route(products_by):
    products_by("fastest")
    with pytest.raises(ValueError, match="LLMOS_FAST_PRODUCT must be one of own, onednn, torch"):
        ops.linear(random(40, 8), random(8, 8), impl="native")


@pytest.mark.skipif("avx2" not in _C.cpu_sets(), reason="the own product needs AVX2 to be ahead")
def test_large_products_of_an_amd_cpu_are_our_own(products_by, monkeypatch, dtype):
    products_by("")
    monkeypatch.setattr(product, "_is_amd", lambda: True)
    # bf16 that the CPU does not multiply never goes to a library where there is much of it
    alone = dtype == torch.bfloat16 and "avx512_bf16" not in _C.cpu_sets()
    medium = {"own"} if alone else {"onednn", "torch"}
    for sizes, expected in (
        ((16, 512, 512), {"few rows"}),
        ((64, 768, 768), medium),
        ((512, 100, 768), medium),
        ((768, 768, 40), medium),
        ((512, 128, 120), {"onednn", "torch"}),
        ((512, 256, 64), {"own"}),
    ):
        rows, columns, depth = sizes
        x, weight = torch.empty(rows, depth, dtype=dtype), torch.empty(columns, depth, dtype=dtype)
        assert product.way(x, weight) in expected


def test_bad_input():
    with pytest.raises(ValueError, match="linear: weight must have 2 dimensions"):
        ops.linear(random(3, 4), random(4))
    with pytest.raises(ValueError, match="linear: last dimension of x must end with"):
        ops.linear(random(3, 5), random(6, 4))
    with pytest.raises(ValueError, match="linear: bias must have shape"):
        ops.linear(random(3, 4), random(6, 4), random(5))
