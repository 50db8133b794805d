"""linear_cross_entropy against its definition, torch's own loss, and its memory promise."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import ops, reference
from llmos_fast.native import linear_cross_entropy as native
from llmos_fast.testing import assert_within_budget, random


def check(rows, features, classes, dtype, bias=True, **options):
    grad = {"dtype": dtype, "requires_grad": True}
    target = torch.randint(0, classes, rows)
    if target.numel() > 1:
        target.view(-1)[0] = -100
    tensors = {
        "hidden": random(*rows, features, **grad),
        "weight": random(classes, features, **grad),
        "target": target,
        "bias": random(classes, **grad) if bias else None,
    }
    reduction = max(features, classes, target.numel())
    assert_within_budget(
        ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        tensors,
        options,
        impl="native",
        reduction=reduction,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"softcap": 3.0},
     {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}],
    ids=str,
)  # fmt: skip
def test_matches_definition(reduction, options, dtype):
    check((5, 7), 33, 103, dtype, reduction=reduction, **options)


@pytest.mark.parametrize("classes", [1, 15, 16, 17, 250])
def test_every_instruction_set(cpu_set, classes, dtype):
    check((9,), 20, classes, dtype, softcap=4.0)
    check((9,), 20, classes, dtype, label_smoothing=0.3)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 90)] * 3),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    bias=st.booleans(),
    block=st.integers(1, 8000),
)
def test_any_size_and_block(sizes, reduction, bias, block):
    rows, features, classes = sizes
    before, native._BLOCK = native._BLOCK, block
    try:
        check((rows + 1,), features, classes, torch.float32, bias, reduction=reduction)
    finally:
        native._BLOCK = before


def test_agrees_with_torch():
    hidden, weight, bias = random(3, 5, 16), random(30, 16), random(30)
    target = torch.randint(0, 30, (3, 5))
    ours = ops.linear_cross_entropy(hidden, weight, target, bias, label_smoothing=0.1)
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target.flatten(), label_smoothing=0.1))


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_all_ignored(impl):
    hidden = random(4, 8, requires_grad=True)
    target = torch.full((4,), -100)
    weight = random(6, 8)
    assert ops.linear_cross_entropy(hidden, weight, target, impl=impl).isnan()
    total = ops.linear_cross_entropy(hidden, weight, target, reduction="sum", impl=impl)
    assert total == 0
    total.backward()
    assert not hidden.grad.any()


def test_no_rows():
    hidden, weight = random(0, 8, requires_grad=True), random(6, 8, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    loss = ops.linear_cross_entropy(hidden, weight, target, reduction="sum", impl="native")
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


def test_backward_twice_and_scaled():
    hidden, weight = random(6, 8, requires_grad=True), random(9, 8, requires_grad=True)
    target = torch.randint(0, 9, (6,))
    loss = ops.linear_cross_entropy(hidden, weight, target, impl="native")
    once = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * loss, weight)[0]
    torch.testing.assert_close(thrice, 3 * once)


BAD = [
    (
        {"target": torch.tensor([0, 9])},
        "target must be in \\[0, 9\\) or ignore_index = -100, got 9",
    ),
    ({"target": torch.tensor([0, -1])}, "target must be in"),
    ({"target": torch.tensor([0])}, "target must have shape"),
    ({"target": torch.tensor([0, 1], dtype=torch.int32)}, "target must be int64"),
    ({"reduction": "max"}, "reduction must be"),
    ({"label_smoothing": 1.5}, "label_smoothing must be in"),
    ({"z_loss": -1.0}, "z_loss must be at least 0"),
    ({"bias": random(8)}, "bias must have shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = {"hidden": random(2, 4), "weight": random(9, 4), "target": torch.tensor([0, 8])}
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        ops.linear_cross_entropy(**(call | change))
