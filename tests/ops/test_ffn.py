"""ffn and gated_ffn against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import ops, reference
from llmos_fast.ops.ffn import ACTIVATIONS
from llmos_fast.testing import assert_within_budget, random


def check_ffn(rows, features, hidden, out, activation, dropout_p, dtype, bias=True):
    g = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "x": random(*rows, features, **g),
        "w1": random(hidden, features, **g),
        "b1": random(hidden, **g) if bias else None,
        "w2": random(out, hidden, **g),
        "b2": random(out, **g) if bias else None,
    }
    options = {"activation": activation, "dropout_p": dropout_p}
    # the gradient of w1 sums over rows, of x over hidden; two products in a row
    reduction = 2 * max(hidden, features, out, torch.Size(rows).numel(), 1)
    assert_within_budget(
        ops.ffn, reference.ffn, tensors, options, impl="native", reduction=reduction
    )


def check_gated(rows, features, hidden, out, activation, dropout_p, dtype, bias=True):
    g = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "x": random(*rows, features, **g),
        "w_gate": random(hidden, features, **g),
        "w_up": random(hidden, features, **g),
        "w_down": random(out, hidden, **g),
        "b_gate": random(hidden, **g) if bias else None,
        "b_up": random(hidden, **g) if bias else None,
        "b_down": random(out, **g) if bias else None,
    }
    options = {"activation": activation, "dropout_p": dropout_p}
    reduction = 2 * max(hidden, features, out, torch.Size(rows).numel(), 1)
    assert_within_budget(
        ops.gated_ffn, reference.gated_ffn, tensors, options, impl="native", reduction=reduction
    )


CHECKS = [check_ffn, check_gated]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("check", CHECKS)
def test_activations(check, activation, dtype):
    check((3, 7), 33, 70, 20, activation, 0.0, dtype)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_every_instruction_set(cpu_set, check, activation, dtype):
    check((5,), 40, 130, 24, activation, 0.3, dtype)


@pytest.mark.parametrize("rows", [5, 40, 200])
@pytest.mark.parametrize("gated", [False, True])
def test_fp32_weights_beside_bf16(gated, rows, products_by):
    products_by("own")
    g = {"dtype": torch.bfloat16, "requires_grad": True}
    op = "gated_ffn" if gated else "ffn"
    names = ("w_gate", "w_up", "w_down") if gated else ("w1", "w2")
    tensors = {"x": random(rows, 33, **g)} | ({} if gated else {"b1": None, "b2": random(20, **g)})
    for name in names:
        last = name == names[-1]
        tensors[name] = random(20 if last else 70, 70 if last else 33, requires_grad=True)
    assert_within_budget(
        getattr(ops, op), getattr(reference, op), tensors, {"dropout_p": 0.3}, impl="native",
        reduction=2 * max(rows, 70),
    )  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_gradients(activation, dtype):
    """Inference may take another way: the activation in the product's own epilogue."""
    tensors = {
        "x": random(3, 7, 33, dtype=dtype),
        "w1": random(70, 33, dtype=dtype),
        "b1": random(70, dtype=dtype),
        "w2": random(20, 70, dtype=dtype),
        "b2": None,
    }
    with torch.no_grad():
        assert_within_budget(
            ops.ffn,
            reference.ffn,
            tensors,
            {"activation": activation},
            impl="native",
            reduction=140,
        )


@settings(max_examples=25, deadline=None)
@given(
    check=st.sampled_from(CHECKS),
    sizes=st.tuples(*[st.integers(1, 80)] * 4),
    activation=st.sampled_from(ACTIVATIONS),
    dropout_p=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_any_size(check, sizes, activation, dropout_p, dtype, bias):
    rows, *rest = sizes
    check((rows,), *rest, activation, dropout_p, dtype, bias)


@pytest.mark.parametrize("rows", [(), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_no_rows_and_one_row(check, rows):
    check(rows, 8, 12, 4, "gelu", 0.1, torch.float32)


def test_extreme_inputs_stay_finite():
    x = torch.tensor([[-1e30, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 1e15]])
    eye = torch.eye(8)
    for activation in ACTIVATIONS:
        ours = ops.ffn(x, eye, None, eye, None, activation=activation, impl="native")
        theirs = reference.ffn(x, eye, None, eye, None, activation=activation)
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite), activation
        torch.testing.assert_close(ours[finite], theirs[finite])


BAD_FFN = [
    ({"x": random(2, 7)}, "last dimension of x must end with the in_features of w1, 8, got"),
    ({"w2": random(4, 11)}, "w2 must have shape"),
    ({"b1": random(11)}, "b1 must have shape"),
    ({"activation": "tanh"}, "activation must be one of relu, .*got 'tanh'"),
    ({"dropout_p": -0.1}, "dropout_p must be in"),
    ({"w1": random(12, 8, dtype=torch.float64)}, "w1 must have the dtype of the input"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FFN, ids=[m for _, m in BAD_FFN])
def test_bad_input(change, message):
    call = {"x": random(2, 8), "w1": random(12, 8), "b1": None, "w2": random(4, 12), "b2": None}
    with pytest.raises(ValueError, match=f"ffn: {message}"):
        ops.ffn(**(call | change))


def test_bad_gated_input():
    x, w = random(2, 8), random(12, 8)
    with pytest.raises(ValueError, match="gated_ffn: w_up must have shape"):
        ops.gated_ffn(x, w, random(11, 8), random(4, 12))
    with pytest.raises(ValueError, match="gated_ffn: w_down must have shape"):
        ops.gated_ffn(x, w, w, random(4, 11))
