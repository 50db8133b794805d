"""Rows of a table: the kernel against the definition, and what both refuse."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import dispatch, explain, ops, reference
from llmos_fast.testing import assert_within_budget, random

# the interpreter's, where it is asked for
TRITON = dispatch.registered()["embedding"][1].module is not None
IMPLEMENTATIONS = ["native", "reference"]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [1, 30, 768])
def test_native_gives_the_bits_of_the_definition(width, index, dtype):
    table = random(37, width + 5, dtype=dtype)
    for weight in (table[:, :width].contiguous(), table[:, 2:-3], table[5:, 2:-3]):
        many = torch.randint(len(weight), (5, 400))  # of 768: on every thread
        for ids in (many, torch.arange(32).flip(0)[::2], torch.tensor(31), many[:0]):
            ids = ids.to(index)
            rows = ops.embedding(ids, weight, impl="native")
            assert rows.dtype == dtype
            assert rows.is_contiguous()
            assert torch.equal(rows, F.embedding(ids, weight))
            assert torch.equal(rows, ops.embedding(ids, weight, impl="reference"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_empty(impl):
    ids = torch.zeros(0, 3, dtype=torch.int64)
    assert ops.embedding(ids, random(0, 8), impl=impl).shape == (0, 3, 8)
    assert ops.embedding(ids[:, :0], random(4, 8), impl=impl).shape == (0, 0, 8)
    assert ops.embedding(torch.tensor([3]), random(4, 0), impl=impl).shape == (1, 0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bad_input(impl):
    weight, ids = random(20, 8), torch.tensor([3])
    for bad in (-1, 20, 2**40):
        rule = rf"embedding: ids must be in \[0, 20\), the rows of weight, got {bad}$"
        with pytest.raises(ValueError, match=rule):
            ops.embedding(torch.tensor([3, bad]), weight, impl=impl)
    with pytest.raises(ValueError, match=r"embedding: ids must be in \[0, 0\)"):
        ops.embedding(ids, weight[:0], impl=impl)
    with pytest.raises(ValueError, match=r"embedding: ids must be int32 or int64, got torch.float"):
        ops.embedding(torch.zeros(3), weight, impl=impl)
    with pytest.raises(ValueError, match="embedding: ids must be on weight's cpu, got meta"):
        ops.embedding(ids.to("meta"), weight, impl=impl)
    with pytest.raises(ValueError, match="embedding: weight must have 2 dimensions"):
        ops.embedding(ids, weight[0], impl=impl)
    with pytest.raises(ValueError, match="embedding: weight must be floating point"):
        ops.embedding(ids, ids.view(1, 1), impl=impl)


def refusal(weight):
    return explain(ops.embedding, torch.tensor([3]), weight)[0].reason


def test_what_takes_the_definition():
    table = random(20, 8)
    assert refusal(table) is None
    assert refusal(table.clone().requires_grad_()) is None
    assert refusal(table.double()) == "needs float32 or bfloat16, got torch.float64"
    assert refusal(table.t()) == "needs contiguous rows of weight, got strides (1, 8)"
    for weight in (table.double(), table.t()):
        ids = torch.tensor([[3, 0]])
        assert torch.equal(ops.embedding(ids, weight), weight[ids])


def check(rows, shape, width, dtype, index=torch.int64, **options):
    seq_dim = options.get("seq_dim", -1)
    grad = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "ids": torch.randint(rows, shape, dtype=index),
        "weight": random(rows, width, **grad),
        "positions": random(shape[seq_dim], width, **grad),
    }
    count = tensors["ids"].numel()
    for impl in ("native", "triton") if TRITON else ("native",):
        assert_within_budget(
            ops.embedding, reference.embedding, tensors, options, impl=impl, reduction=count + 1
        )


@pytest.mark.parametrize("seq_dim", [0, 1, -1, -3])
def test_positions_along_any_dimension(seq_dim, dtype):
    check(20, (4, 7, 3), 33, dtype, seq_dim=seq_dim, scale=0.5, dropout_p=0.3)


@pytest.mark.parametrize("width", [1, 16, 70])
def test_every_instruction_set(cpu_set, width, dtype):
    check(11, (3, 5), width, dtype, torch.int32, scale=3.0, dropout_p=0.3)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 300),
    shape=st.tuples(st.integers(0, 6), st.integers(0, 40)),
    width=st.integers(0, 70),
    dropout_p=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_any_size(rows, shape, width, dropout_p):
    check(rows, shape, width, torch.float32, dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": random(2, 8)}, r"positions must have shape \(seq width\) = \(3, 8\)"),
        ({"positions": random(3, 8).double()}, "positions must have the dtype of weight"),
        ({"positions": random(3, 8), "seq_dim": 1}, "seq_dim must be a dimension of ids"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"embedding: {message}"):
        ops.embedding(torch.tensor([3, 1, 2]), random(20, 8), **options)


def test_gradients_sum_what_repeats():
    leaf = random(6, 4, requires_grad=True)
    ops.embedding(torch.tensor([[1, 5, 1], [0, 1, 3]]), leaf).sum().backward()
    assert torch.equal(leaf.grad[:, 0], torch.tensor([1.0, 3.0, 0.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize("train", [False, True])
def test_compiles_in_one_graph(train, dtype):
    torch._dynamo.reset()
    weight = random(20, 8, dtype=dtype, requires_grad=train)
    ids = torch.tensor([[3, 19, 3]])
    compiled = torch.compile(ops.embedding, fullgraph=True, backend="aot_eager")
    rows = compiled(ids, weight)
    assert torch.equal(rows, ops.embedding(ids, weight))
    if train:
        rows.sum().backward()
        assert torch.equal(weight.grad.sum(1), 8 * torch.bincount(ids[0], minlength=20).to(dtype))


def test_autocast_leaves_the_dtype_of_the_table():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.embedding(torch.tensor([3]), random(20, 8)).dtype == torch.float32


def test_shapes_on_the_meta_device():
    ids = torch.zeros(2, 3, dtype=torch.int32, device="meta")
    assert ops.embedding(ids, random(20, 8).to("meta")).shape == (2, 3, 8)


def test_torch_func_takes_the_definition():
    ids, weight = torch.tensor([3, 1, 3]), random(5, 4)
    gradient = torch.func.grad(lambda w: ops.embedding(ids, w).sum())(weight)
    assert torch.equal(gradient[:, 0], torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]))
