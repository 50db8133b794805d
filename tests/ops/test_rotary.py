"""rotary against its definition."""

import pytest
import torch

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [0, 1, 7, 16, 20])
@pytest.mark.parametrize("per_batch", [False, True])
def test_matches_definition(interleaved, half, per_batch, dtype):
    angles = (2, 9, half) if per_batch else (9, half)
    tensors = {
        "query": random(2, 4, 9, 40, dtype=dtype, requires_grad=True),
        "key": random(2, 2, 9, 40, dtype=dtype, requires_grad=True),
        "cos": random(*angles, dtype=dtype),
        "sin": random(*angles, dtype=dtype),
    }
    assert_within_budget(
        ops.rotary,
        reference.rotary,
        tensors,
        {"interleaved": interleaved},
        impl="native",
        reduction=2,
    )


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(9,), (2, 9)], ids=str)
def test_positions_choose_rows_of_the_table(shape, index, dtype):
    tensors = {
        "query": random(2, 4, 9, 40, dtype=dtype, requires_grad=True),
        "key": random(2, 2, 9, 40, dtype=dtype, requires_grad=True),
        "cos": random(30, 16, dtype=dtype),
        "sin": random(30, 16, dtype=dtype),
    }
    positions = torch.randint(30, shape).to(index)
    assert_within_budget(
        ops.rotary,
        reference.rotary,
        tensors,
        {"positions": positions},
        impl="native",
        reduction=2,
    )


def test_every_instruction_set(cpu_set):
    test_matches_definition(False, 20, True, torch.float32)
    test_matches_definition(True, 20, False, torch.bfloat16)


def test_strided_views_and_rotation_keeps_length():
    query, key = random(2, 9, 2, 4, 16).permute(2, 0, 3, 1, 4)
    angle = random(9, 8)
    turned, _ = ops.rotary(query, key, angle.cos(), angle.sin(), impl="native")
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))


def test_angles_with_gradient_take_the_definition():
    query, key = random(1, 1, 3, 4), random(1, 1, 3, 4)
    cos = random(3, 2, requires_grad=True)
    ops.rotary(query, key, cos, random(3, 2))[0].sum().backward()
    assert cos.grad is not None


BAD = [
    ({"key": random(1, 1, 4, 8)}, "key must have shape"),
    ({"cos": random(3, 5)}, "last dimension of cos must be at most"),
    ({"cos": random(2, 4)}, "cos must have shape"),
    ({"sin": random(3, 3)}, "sin must have shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = {
        "query": random(1, 2, 3, 8),
        "key": random(1, 1, 3, 8),
        "cos": random(3, 4),
        "sin": random(3, 4),
    }
    with pytest.raises(ValueError, match=f"rotary: {message}"):
        ops.rotary(**(call | change))
