"""add_norm and dropout on the GPU kernels: truth, launches, registration, what is not touched."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmos_fast.kernels import add_norm, add_norm_backward, dropout
from llmos_fast.kernels.add_norm_backward import BackwardLaunch, choose_backward
from llmos_fast.kernels.dropout import RowsLaunch
from llmos_fast.kernels.launch import forced

from llmos_fast import ops, reference
from llmos_fast.testing import (
    assert_close_to_truth,
    assert_within_budget,
    outputs_and_gradients,
    random,
    registered_calls,
)

# by name: what changes in a call of all tensors, LayerNorm and one dtype
FEATURES = {
    "rms": {"kind": "rms"},
    "dropout": {"dropout_p": 0.3},
    "no residual": {"residual": None},
    "no weight": {"weight": None},
    "no bias": {"bias": None},
    "fp32 residual": {"residual": torch.float32},
    "fp16 residual": {"residual": torch.float16},
    "fp32 weight": {"weight": torch.float32},
}
TENSORS = ("x", "residual", "weight", "bias")
# one row and several, one block and several with a tail
LAUNCHES = [
    {
        "add_norm_forward": RowsLaunch(1, 128, num_warps=4),
        "add_norm_backward": BackwardLaunch(1, 128, 1, 4, per_multiprocessor=1),
        "dropout": RowsLaunch(1, 128, num_warps=4),
    },
    {
        "add_norm_forward": RowsLaunch(4, 32, num_warps=4),
        "add_norm_backward": BackwardLaunch(2, 32, 2, 4, per_multiprocessor=3),
        "add_norm_backward_means": RowsLaunch(4, 16, num_warps=4),
        "dropout": RowsLaunch(16, 32, num_warps=4),
    },
    {
        "add_norm_forward": RowsLaunch(1, 64, num_warps=4),
        "add_norm_backward": BackwardLaunch(16, 128, 3, 4, per_multiprocessor=2),
        "dropout": RowsLaunch(2, 16, num_warps=4),
    },
]


def make(shape, dtype, names=()):
    """(tensors, options) of a call with these FEATURES."""
    changes = {}
    for name in names:
        changes |= FEATURES[name]
    tensors = {}
    for name in TENSORS:
        change = changes.pop(name, dtype)
        size = shape if name in ("x", "residual") else shape[-1:]
        grad = {"requires_grad": True}
        tensors[name] = None if change is None else random(*size, dtype=change, **grad)
    return tensors, changes


def check(shape, dtype, names=()):
    tensors, options = make(shape, dtype, names)
    rows = torch.Size(shape[:-1]).numel()
    assert_within_budget(
        ops.add_norm,
        reference.add_norm,
        tensors,
        options,
        impl="triton",
        reduction=max(rows, shape[-1], 1),
    )


@pytest.mark.parametrize("kind", [[], ["rms"]], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 64), (40, 33), (5, 253), (70,)], ids=str)
def test_sizes(shape, kind, dtype):
    check(shape, dtype, [*kind, "dropout"])


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name, dtype):
    check((9, 100), dtype, [name])


@pytest.mark.parametrize("pair", list(combinations(FEATURES, 2)), ids=" and ".join)
def test_pairs_of_features(pair):
    check((9, 37), torch.bfloat16, pair)


@pytest.mark.parametrize("launches", LAUNCHES, ids=["one row", "blocks", "many rows"])
@pytest.mark.parametrize("names", [[], ["rms"]], ids=["layer", "rms"])
@pytest.mark.parametrize("rows", [2, 37])
def test_launches(launches, names, rows, dtype):
    with forced(**launches):
        for more in (["dropout"], ["no residual"]):
            check((rows, 101), dtype, [*names, *more])


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 60),
    # eager PyTorch overflows in fp16 where few features hardly differ
    features=st.integers(8, 150),
    names=st.sets(st.sampled_from(list(FEATURES)), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    launches=st.sampled_from([{}, LAUNCHES[1]]),
)
def test_any_size(rows, features, names, dtype, launches):
    with forced(**launches):
        check((rows, features), dtype, sorted(names))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("launches", LAUNCHES[:2], ids=["one block", "blocks"])
def test_a_large_mean_cancels_nothing(kind, launches):
    """E[x^2] - E[x]^2 would leave nothing of a variance of 1 beside a mean of 10000."""
    x = (random(6, 100) + 1e4).requires_grad_()
    with forced(**launches):
        assert_within_budget(
            ops.add_norm,
            reference.add_norm,
            {"x": x, "residual": None, "weight": None},
            {"kind": kind},
            impl="triton",
            reduction=100,
        )


@pytest.mark.parametrize("launches", LAUNCHES[:2], ids=["one block", "blocks"])
def test_statistics_come_from_the_total_as_it_is_returned(launches):
    """A residual of 256 rounds x in bf16: norms follow from what is left of it."""
    x, residual = random(3, 70, dtype=torch.bfloat16), torch.full((3, 70), 256.0).bfloat16()
    with forced(**launches):
        norm, total = ops.add_norm(x, residual, None, impl="triton")
    assert_close_to_truth(
        norm,
        reference.add_norm(total, None, None)[0],
        reference.add_norm(total.double(), None, None)[0],
        reduction=70,
    )


def test_without_a_residual_the_total_is_x():
    x = random(4, 20, requires_grad=True)
    norm, total = ops.add_norm(x, None, None, impl="triton")
    assert total is x
    assert norm.shape == x.shape


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["norm", "total", "both"])
@pytest.mark.parametrize("names", [[], ["dropout"], ["fp32 residual"], ["no residual"]], ids=str)
def test_gradients_of_one_result_or_both(names, used):
    tensors, options = make((5, 21), torch.bfloat16, names)

    def some(op):
        return lambda **call: tuple(op(**call)[i] for i in used)

    assert_within_budget(
        some(ops.add_norm), some(reference.add_norm), tensors, options, impl="triton", reduction=21
    )


@pytest.mark.parametrize("wanted", TENSORS)
def test_gradient_of_one_tensor_alone(wanted, dtype):
    tensors, options = make((5, 21), dtype, ["dropout"])
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    assert_within_budget(
        ops.add_norm, reference.add_norm, tensors, options, impl="triton", reduction=21
    )


def test_a_gradient_that_nobody_sends_is_not_read(monkeypatch):
    calls = []
    for module in (add_norm, add_norm_backward, dropout):
        monkeypatch.setattr(module, "launch", lambda k, _, __, **a: calls.append((k.__name__, a)))
    tensors, _ = make((3, 8), torch.float32)
    for result in ops.add_norm(**tensors, impl="triton"):
        wanted = [tensors["x"], tensors["residual"]]
        torch.autograd.grad(result, wanted, torch.ones_like(result), retain_graph=True)
    names = ["add_norm_forward", "add_norm_backward", "add_norm_backward_sum"]
    assert [name for name, _ in calls] == names
    assert calls[1][1]["d_total"] is None
    # one tensor is the gradient of x and of the residual
    assert calls[1][1]["d_residual"] is None


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 0)], ids=str)
def test_empty(shape):
    tensors, _ = make(shape, torch.float32)
    norm, total = ops.add_norm(**tensors, dropout_p=0.1, impl="triton")
    assert norm.shape == total.shape == shape
    (norm.sum() + total.sum()).backward()
    for tensor in tensors.values():
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()
    assert ops.dropout(tensors["x"], 0.5, impl="triton").shape == shape


@pytest.mark.parametrize("launches", LAUNCHES[:2], ids=["one block", "blocks"])
def test_any_strides(launches):
    base = {"x": random(9, 2, 40).transpose(0, 1), "residual": random(2, 9, 80)[..., ::2]}
    base |= {"weight": random(80)[::2], "bias": random(1).expand(40)}
    tensors = {n: t.requires_grad_() for n, t in base.items()}
    with forced(**launches):
        ours = outputs_and_gradients(ops.add_norm, tensors, {"dropout_p": 0.2, "impl": "triton"})
        plain = {n: t.detach().contiguous().requires_grad_() for n, t in tensors.items()}
        same = outputs_and_gradients(ops.add_norm, plain, {"dropout_p": 0.2, "impl": "triton"})
    for out, other in zip(ours[0], same[0], strict=True):
        assert torch.equal(out, other)
    for name, gradient in ours[1].items():
        assert torch.equal(gradient, same[1][name]), name


def test_the_same_from_run_to_run(dtype):
    tensors, _ = make((50, 40), dtype)
    options = {"dropout_p": 0.3, "impl": "triton"}
    first, second = (outputs_and_gradients(ops.add_norm, tensors, options, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][name], second[1][name]) for name in tensors)


@pytest.mark.parametrize("launches", [{}, *LAUNCHES])
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.25, 1.0])
def test_dropout_draws_the_bits_of_the_definition(p, launches):
    x = random(7, 101)
    with forced(**launches):
        torch.manual_seed(7)
        ours = ops.dropout(x, p, impl="triton")
        torch.manual_seed(7)
        _, total = ops.add_norm(x, torch.zeros_like(x), None, dropout_p=p, impl="triton")
    torch.manual_seed(7)
    truth = reference.dropout(x, p)
    assert torch.equal(ours, truth)
    assert torch.equal(total, truth)


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_and_its_gradients(p, residual, dtype):
    x = random(3, 7, 130, dtype=dtype, requires_grad=True)
    other = None if residual is None else random(3, 7, 130, dtype=residual, requires_grad=True)
    tensors = {"x": x, "residual": other}
    if other is None and p == 0.0:
        assert ops.dropout(x, p, impl="triton") is x
        return
    assert_within_budget(
        ops.dropout, reference.dropout, tensors, {"p": p}, impl="triton", reduction=1
    )


def case(op, dtype=torch.float32):
    """(function of the op, tensors, options) that use most of what it has."""
    tensors, _ = make((3, 5, 6), dtype)
    if op == "dropout":
        return ops.dropout, {n: tensors[n] for n in ("x", "residual")}, {"p": 0.25}
    return ops.add_norm, tensors, {"dropout_p": 0.25}


def recorded(function, tensors, options):
    """Every registered op that a call and its gradients reach, with its arguments."""
    with registered_calls() as calls:
        outputs_and_gradients(function, tensors, options | {"impl": "triton"})
    return calls


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("op", ["add_norm", "dropout"])
def test_opcheck(op, plain):
    function, tensors, options = case(op)
    if plain and op == "add_norm":
        tensors["residual"], options = None, {"kind": "rms"}
    elif plain:
        tensors["residual"] = None
    calls = recorded(function, tensors, options)
    names = {f"llmos_fast::{op}_triton"}
    if op == "add_norm":
        names.add("llmos_fast::add_norm_triton_backward")
    assert set(calls) == names
    for registered, arguments in calls.values():
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(registered, detached)


@pytest.mark.parametrize("names", [[], ["no residual", "rms"], ["fp32 residual"]], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(names, dtype):
    torch._dynamo.reset()
    tensors, options = make((3, 5, 6), dtype, names)
    options |= {"impl": "triton"}
    compiled = torch.compile(ops.add_norm, fullgraph=True, backend="aot_eager")
    eager_out, eager_gradients = outputs_and_gradients(ops.add_norm, tensors, options)
    out, gradients = outputs_and_gradients(compiled, tensors, options)
    for ours, theirs in zip(out, eager_out, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, eager_gradients[name]), name


@pytest.mark.parametrize("op", ["add_norm", "dropout"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_dropout_draws_anew(op):
    torch._dynamo.reset()
    function, tensors, options = case(op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first, second = (compiled(**tensors, **options, impl="triton") for _ in range(2))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("names", [[], ["rms", "no bias", "dropout"]], ids=str)
def test_gradients_of_gradients(names):
    def second(function, tensors, options):
        wanted = [t for t in tensors.values() if t is not None]
        torch.manual_seed(0)
        norm, total = function(**tensors, **options)
        loss = norm.square().sum() + total.square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)

    tensors, options = make((3, 5, 6), torch.float32, names)
    ours = second(ops.add_norm, tensors, options | {"impl": "triton"})
    eager = second(reference.add_norm, tensors, options)
    wide = {
        n: None if t is None else t.detach().double().requires_grad_() for n, t in tensors.items()
    }
    truth = second(reference.add_norm, wide, options)
    for out, low, true in zip(ours, eager, truth, strict=True):
        # the reduction counts both differentiations, each of up to 100 terms
        assert_close_to_truth(out, low, true, reduction=10_000)


def test_second_derivatives_of_dropout():
    """It is linear: the gradient of its gradient is dropped by the same bits once more."""
    x = random(4, 9, requires_grad=True)
    direction = random(4, 9, requires_grad=True)
    torch.manual_seed(3)
    out = ops.dropout(x, 0.4, impl="triton")
    (first,) = torch.autograd.grad(out, x, direction, create_graph=True)
    (second,) = torch.autograd.grad(first, direction, torch.ones_like(x))
    torch.manual_seed(3)
    assert torch.equal(second, reference.dropout(torch.ones_like(x), 0.4))


def test_shapes_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    ours = torch.ops.llmos_fast
    bf16, fp32 = torch.bfloat16, torch.float32
    with FakeTensorMode():
        x = torch.empty(2, 5, 8, device="cuda", dtype=bf16)
        residual, weight = x.float(), torch.empty(8, device="cuda")
        results = ours.add_norm_triton(x, residual, weight, None, False, 1e-5, 0.0, None)
        norm, total, mean, rstd = results
        gradients = ours.add_norm_triton_backward(
            norm, None, total, weight, mean, rstd, False, 0.0, None, bf16, fp32, fp32, None
        )
        dropped = ours.dropout_triton(x, residual, 0.0, None, fp32)
    assert [(tuple(t.shape), t.dtype) for t in (*results, *gradients, dropped)] == [
        ((2, 5, 8), fp32), ((2, 5, 8), fp32), ((10,), fp32), ((10,), fp32),
        ((2, 5, 8), bf16), ((2, 5, 8), fp32), ((8,), fp32), ((0,), fp32),
        ((2, 5, 8), fp32),
    ]  # fmt: skip
    assert norm.device.type == "cuda"
    assert norm.stride() == (40, 8, 1)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="needs bfloat16, float16 or float32"):
        ops.add_norm(random(2, 4).double(), None, None, impl="triton")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("features", [1, 64, 768, 8192, 8193, 32768, 65536])
def test_launches_hold_a_row_or_cut_it(arch, features):
    forward = add_norm.choose_forward(arch, features, mixed=False)
    backward = choose_backward(arch, features)
    assert features <= forward.BLOCK or features > 32768
    assert features <= backward.BLOCK or features > 8192
