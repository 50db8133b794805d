"""rotary on the GPU kernel: pairs, positions, strides, in place, as registered ops."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmos_fast.kernels import rotary
from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.rotary import RotaryLaunch

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, outputs_and_gradients, random

FEATURES = ("interleaved", "per batch", "in part", "positions", "strided", "one head")


def call(names=(), dtype=torch.float32, seq=9, half=8):
    """(tensors, options) of a call with these FEATURES."""
    head_dim = 2 * half + (5 if "in part" in names else 0)
    heads_q, heads_k = (1, 1) if "one head" in names else (5, 2)
    if "strided" in names:
        packed = random(2, seq, heads_q + heads_k, 2 * head_dim, dtype=dtype)
        query, key = packed[..., ::2].transpose(1, 2).split((heads_q, heads_k), dim=1)
    else:
        query = random(2, heads_q, seq, head_dim, dtype=dtype)
        key = random(2, heads_k, seq, head_dim, dtype=dtype)
    tensors = {"query": query.requires_grad_(), "key": key.requires_grad_()}
    shape = (seq, half)
    if "positions" in names:
        shape = (30, half)
        tensors["positions"] = torch.randint(30, (2, seq) if "per batch" in names else (seq,))
    elif "per batch" in names:
        shape = (2, seq, half)
    tensors |= {"cos": random(*shape), "sin": random(*shape)}
    return tensors, {"interleaved": "interleaved" in names}


def check(names, dtype, **sizes):
    tensors, options = call(names, dtype, **sizes)
    assert_within_budget(ops.rotary, reference.rotary, tensors, options, impl="triton", reduction=2)


@pytest.mark.parametrize(
    "names", [(), *((n,) for n in FEATURES), *combinations(FEATURES, 2)], ids=str
)
def test_features_and_pairs(names, dtype):
    check(names, dtype)


@pytest.mark.parametrize("launch", [RotaryLaunch(1, 1, 4), RotaryLaunch(8, 4, 4)], ids=str)
@pytest.mark.parametrize("names", [(), ("interleaved", "in part", "positions")], ids=str)
def test_any_tiling(launch, names):
    with forced(rotary=launch):
        check(names, torch.bfloat16)


@settings(max_examples=20, deadline=None)
@given(
    seq=st.integers(1, 40),
    half=st.integers(0, 20),
    names=st.sets(st.sampled_from(FEATURES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_size(seq, half, names, dtype):
    if half == 0:
        names = names | {"in part"}
    check(names, dtype, seq=seq, half=half)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=str)
def test_empty(shape):
    x = random(*shape, requires_grad=True)
    angles = random(shape[2], 4)
    query, key = ops.rotary(x, x, angles, angles, impl="triton")
    assert query.shape == key.shape == shape
    (query.sum() + key.sum()).backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result(used, monkeypatch):
    tensors, options = call()
    tensors = {n: t.detach().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    results = ops.rotary(**tensors, **options, impl="triton")
    direction = random(*results[used].shape)
    name = ("query", "key")[used]
    launched = []
    monkeypatch.setattr(rotary, "launch", lambda *_, **a: launched.append(a))
    torch.autograd.grad(results[used], tensors[name], direction)
    assert [a[n] is None for a in launched for n in ("query", "key")] == [used == 1, used == 0]


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("names", [(), ("interleaved", "in part", "strided"), ("positions",)])
def test_in_place(impl, names, dtype):
    tensors, options = call(names, dtype)
    tensors = {n: t.detach().clone() for n, t in tensors.items()}
    expected = ops.rotary(**tensors, **options, impl=impl)
    results = ops.rotary(**tensors, **options, inplace=True, impl=impl)
    for result, name, other in zip(results, ("query", "key"), expected, strict=True):
        assert result is tensors[name]
        assert torch.equal(result, other)


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_positions_choose_rows_of_the_table(impl, index_dtype):
    tensors, _ = call(("positions", "per batch"))
    positions = tensors.pop("positions").to(index_dtype)
    chosen = {n: tensors[n][positions.long()] for n in ("cos", "sin")}
    expected = ops.rotary(**(tensors | chosen), impl=impl)
    results = ops.rotary(**tensors, positions=positions, impl=impl)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result, other)


def test_no_position_leaves_the_table():
    """A GPU cannot be asked without waiting for it: positions are held to the table."""
    tensors, _ = call(("positions",))
    query, key = tensors["query"].detach(), tensors["key"].detach()
    outside = torch.full((9,), 10**6), torch.full((9,), -7)
    inside = torch.full((9,), 29), torch.full((9,), 0)
    for wrong, right in zip(outside, inside, strict=True):
        found = []
        for positions in (wrong, right):
            out = torch.empty_like(query), torch.empty_like(key)
            rotary.rotate(query, key, *out, tensors["cos"], tensors["sin"], positions, False, False)
            found.append(out)
        assert torch.equal(found[0][0], found[1][0])


BAD = [
    ({"positions": torch.zeros(9)}, "positions must be int32 or int64"),
    ({"positions": torch.zeros(8, dtype=torch.int64)}, "positions must have shape"),
    ({"positions": torch.full((9,), 9)}, r"positions must be in \[0, 9\), the rows of cos, got 9"),
    ({"positions": torch.full((9,), -1)}, r"positions must be in \[0, 9\)"),
    (
        {"positions": torch.zeros(9, dtype=torch.int64), "cos": random(2, 9, 8)},
        "cos must have 2 dimensions beside positions",
    ),
    (
        {"positions": torch.zeros(9, dtype=torch.int64), "cos": random(0, 8)},
        "cos must have a row for positions",
    ),
    ({"inplace": True}, "query must need no gradient with inplace"),
    (
        {"query": random(1, 1, 9, 16).expand(2, 5, 9, 16), "inplace": True},
        "query must have elements of its own",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    tensors, options = call()
    with pytest.raises(ValueError, match=f"rotary: {message}"):
        ops.rotary(**(tensors | options | change))


def test_in_place_takes_two_tensors():
    x, angles = random(1, 2, 3, 8), random(3, 4)
    packed = random(1, 5, 3, 8)
    for query, key in ((x, x), (packed[:, :3], packed[:, 2:]), (packed[:, :1], packed[:, :4])):
        with pytest.raises(ValueError, match="rotary: key must have no element in common"):
            ops.rotary(query, key, angles, angles, inplace=True)


@pytest.mark.parametrize("layout", ["heads of a token", "tokens of a head", "features"])
def test_in_place_takes_slices_of_a_packed_projection(layout):
    if layout == "features":
        query, key = random(2, 3, 9, 32).chunk(2, dim=-1)
    else:
        packed = random(2, 9, 7, 16).transpose(1, 2)
        packed = packed if layout == "heads of a token" else packed.contiguous()
        query, key = packed.split((5, 2), dim=1)
    angles = random(9, 8)
    expected = ops.rotary(query.clone(), key.clone(), angles, angles, impl="triton")
    found = ops.rotary(query, key, angles, angles, inplace=True, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", ["triton", "native", "reference"])
def test_in_place_is_seen_by_autograd(impl):
    query, key, angles = random(1, 2, 3, 8), random(1, 2, 3, 8), random(3, 4)
    loss = (query * random(8, requires_grad=True)).sum()
    ops.rotary(query, key, angles, angles, inplace=True, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_in_place_compiles_in_one_graph():
    torch._dynamo.reset()
    tensors, _ = call(("positions",))
    given = {n: t.detach().clone() for n, t in tensors.items()}
    expected = ops.rotary(**given, impl="triton")
    compiled = torch.compile(ops.rotary, fullgraph=True, backend="aot_eager")
    compiled(**given, inplace=True, impl="triton")
    assert torch.equal(given["query"], expected[0])
    assert torch.equal(given["key"], expected[1])


# as registered ops


@pytest.mark.parametrize("names", [(), ("interleaved", "positions")], ids=str)
def test_opcheck(names):
    tensors, options = call(names)
    t = {n: x.detach() for n, x in tensors.items()}
    arguments = (t["query"], t["key"], t["cos"], t["sin"], t.get("positions"))
    flags = (options["interleaved"], False)
    torch.library.opcheck(torch.ops.llmos_fast.rotary_triton.default, (*arguments, *flags))
    torch.library.opcheck(torch.ops.llmos_fast.rotary_triton_.default, (*arguments, flags[0]))


@pytest.mark.parametrize("names", [(), ("interleaved", "positions", "strided")], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(names, dtype):
    torch._dynamo.reset()
    tensors, options = call(names, dtype)
    tensors = {n: t.detach().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    options |= {"impl": "triton"}
    compiled = torch.compile(ops.rotary, fullgraph=True, backend="aot_eager")
    eager_out, eager_gradients = outputs_and_gradients(ops.rotary, tensors, options)
    out, gradients = outputs_and_gradients(compiled, tensors, options)
    for ours, theirs in zip(out, eager_out, strict=True):
        assert torch.equal(ours, theirs)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, eager_gradients[name]), name


def test_gradients_of_gradients():
    """Rotating back and forth gives the identity times cos^2 + sin^2."""
    tensors, options = call()
    cos, sin = torch.cos(tensors["cos"]), torch.sin(tensors["cos"])
    query, key = (tensors[n].detach().requires_grad_() for n in ("query", "key"))
    out, _ = ops.rotary(query, key, cos, sin, **options, impl="triton")
    (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), query)
    torch.testing.assert_close(second, torch.full_like(second, 2.0))


def test_shapes_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query = torch.empty(2, 9, 5, 16, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        angles = torch.empty(9, 8, device="cuda")
        out, none = torch.ops.llmos_fast.rotary_triton(
            query, None, angles, angles, None, False, False
        )
    assert out.shape == (2, 5, 9, 16)
    assert out.is_contiguous()
    assert out.dtype == torch.bfloat16
    assert none.numel() == 0


@pytest.mark.parametrize("impl", ["native", "triton", "reference"])
@pytest.mark.parametrize("bad", [-1, 9])
def test_no_implementation_reads_beside_the_table(impl, bad):
    tensors, options = call()
    positions = torch.zeros(9, dtype=torch.int64)
    positions[5] = bad
    with pytest.raises(
        ValueError, match=rf"positions must be in \[0, 9\), the rows of cos, got {bad}"
    ):
        ops.rotary(**(tensors | options | {"positions": positions, "impl": impl}))
