"""linear against its definition, and the products behind it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import ops, reference
from llmos_fast.native import product
from llmos_fast.testing import assert_within_budget, random


@pytest.fixture(params=["onednn", "mkl"])
def route(request, monkeypatch):
    """Both libraries, whatever this CPU prefers."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(product, "route", lambda: request.param)
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


@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_matches_definition(route, rows, bias, dtype):
    check(rows, 33, 70, bias, dtype)


@pytest.mark.parametrize("sizes", [(0, 8, 4), (5, 0, 4), (5, 8, 0)], ids=str)
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


def test_bad_input():
    with pytest.raises(ValueError, match="linear: weight must have 2 dimensions"):
        ops.linear(random(3, 4), random(4))
    with pytest.raises(ValueError, match="linear: last dimension of x must end with"):
        ops.linear(random(3, 5), random(6, 4))
    with pytest.raises(ValueError, match="linear: bias must have shape"):
        ops.linear(random(3, 4), random(6, 4), random(5))
