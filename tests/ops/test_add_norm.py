"""add_norm and dropout against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random


def check(shape, kind="layer", dropout_p=0.0, dtype=torch.float32, residual=True, affine="wb",
          residual_dtype=None):  # fmt: skip
    grad = {"requires_grad": True}
    tensors = {
        "x": random(*shape, dtype=dtype, **grad),
        "residual": random(*shape, dtype=residual_dtype or dtype, **grad) if residual else None,
        "weight": random(shape[-1], dtype=residual_dtype or dtype, **grad)
        if "w" in affine
        else None,
        "bias": random(shape[-1], dtype=residual_dtype or dtype, **grad) if "b" in affine else None,
    }
    options = {"kind": kind, "dropout_p": dropout_p}
    # the gradient of the weight sums over rows
    reduction = max(*shape, torch.Size(shape[:-1]).numel(), 1)
    assert_within_budget(
        ops.add_norm, reference.add_norm, tensors, options, impl="native", reduction=reduction
    )


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("columns", [1, 7, 63, 64, 253, 1000])
def test_widths(kind, columns, dtype):
    check((3, 5, columns), kind, 0.2, dtype)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_every_instruction_set(cpu_set, kind, dtype):
    check((9, 100), kind, 0.4, dtype)


@pytest.mark.parametrize("affine", ["", "w", "b", "wb"])
@pytest.mark.parametrize("residual", [True, False])
def test_optional_tensors(affine, residual, dtype):
    check((4, 33), affine=affine, residual=residual, dtype=dtype)


def test_bf16_on_an_fp32_residual():
    """What autocast makes: a product in bf16 is added to a residual stream in fp32."""
    x = random(5, 40, dtype=torch.bfloat16)
    residual = random(5, 40)
    norm, total = ops.add_norm(x, residual, torch.ones(40), impl="native")
    assert total.dtype == norm.dtype == torch.float32
    assert torch.equal(total, residual + x)
    check((5, 40), dtype=torch.bfloat16, residual_dtype=torch.float32, dropout_p=0.3)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_other_dtypes(cpu_set, weight_dtype, bias_dtype, dtype):
    x, weight, bias = random(5, 40, dtype=dtype), random(40), random(40)
    weight, bias = weight.to(weight_dtype), bias.to(bias_dtype)
    ours, _ = ops.add_norm(x, None, weight, bias, impl="native")
    wide, _ = ops.add_norm(x, None, weight.float(), bias.float(), impl="native")
    assert torch.equal(ours, wide)


def packed_heads(dtype):
    return random(6, 5 * 33, dtype=dtype).view(2, 3, 5, 33)


STRIDED = {
    "queries": lambda dtype: packed_heads(dtype)[:, :, 1:4].transpose(1, 2),
    "rows": lambda dtype: random(6, 50, dtype=dtype)[::2, 3:20],
    "a row for all": lambda dtype: random(1, 17, dtype=dtype).expand(4, 17),
    "columns": lambda dtype: random(17, 6, dtype=dtype).t(),
    "more dimensions": lambda dtype: random(2, 3, 4, 5, 40, dtype=dtype)[:, 1:, ::2, :, 3:20],
    "one row": lambda dtype: random(40, dtype=dtype)[3:20],
}


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strided(make, residual, kind, dtype):
    x = make(dtype)
    weight = random(x.shape[-1], dtype=dtype)
    other = random(*x.shape, dtype=dtype) if residual else None
    results = []
    for layout in (x, x.contiguous()):
        leaf = layout.detach().requires_grad_()
        torch.manual_seed(3)
        norm, total = ops.add_norm(leaf, other, weight, kind=kind, dropout_p=0.2, impl="native")
        gradient = torch.autograd.grad(norm.float().square().sum() + total.sum(), leaf)
        results.append((norm, total, *gradient))
    for ours, dense in zip(*results, strict=True):
        assert torch.equal(ours, dense)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    kind=st.sampled_from(["layer", "rms"]),
    dropout_p=st.sampled_from([0.0, 0.1, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size(rows, columns, kind, dropout_p, dtype):
    check((rows, columns), kind, dropout_p, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0)], ids=str)
def test_empty(shape):
    x = random(*shape, requires_grad=True)
    weight = random(shape[-1], requires_grad=True)
    norm, total = ops.add_norm(x, x, weight, impl="native")
    assert norm.shape == total.shape == shape
    (norm.sum() + total.sum()).backward()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_agrees_with_layer_norm():
    x, weight, bias = random(6, 50), random(50), random(50)
    norm, total = ops.add_norm(x, None, weight, bias, impl="native")
    assert torch.equal(total, x)
    torch.testing.assert_close(norm, F.layer_norm(x, (50,), weight, bias))


def test_gradient_through_one_result_only():
    for index in (0, 1):
        x = random(4, 20, requires_grad=True)
        ours = ops.add_norm(x, x, None, impl="native")[index]
        theirs = reference.add_norm(x, x, None)[index]
        direction = random(4, 20, seed=3)
        torch.testing.assert_close(
            torch.autograd.grad(ours, x, direction), torch.autograd.grad(theirs, x, direction)
        )


def test_dropout_statistics_and_definition(dtype):
    x = torch.ones(500, 500, dtype=dtype)
    for p in (0.1, 0.5, 0.9):
        torch.manual_seed(7)
        ours = ops.dropout(x, p, impl="native")
        torch.manual_seed(7)
        assert torch.equal(ours, reference.dropout(x, p))
        dropped = (ours == 0).double().mean().item()
        assert abs(dropped - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert torch.equal(ops.dropout(x, 0.0), x)
    assert not ops.dropout(x, 1.0).any()


@pytest.mark.parametrize("residual", [True, False])
def test_dropout_gradients(cpu_set, residual, dtype):
    tensors = {
        "x": random(7, 130, dtype=dtype, requires_grad=True),
        "residual": random(7, 130, dtype=dtype, requires_grad=True) if residual else None,
    }
    assert_within_budget(
        ops.dropout, reference.dropout, tensors, {"p": 0.3}, impl="native", reduction=1
    )


BAD = [
    ({"residual": random(3, 9)}, "residual must have shape"),
    ({"weight": random(9)}, "weight must have shape"),
    ({"kind": "batch"}, "kind must be"),
    ({"eps": 0.0}, "eps must be positive, got 0.0"),
    ({"dropout_p": 2.0}, "dropout_p must be in"),
    ({"x": torch.ones(3, 8, dtype=torch.int32)}, "x must be floating point"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = {"x": random(3, 8), "residual": random(3, 8), "weight": random(8)}
    with pytest.raises(ValueError, match=f"add_norm: {message}"):
        ops.add_norm(**(call | change))
