"""ffn and gated_ffn on the GPU kernels: every feature, any tiling, any size, as registered ops."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmos_fast.kernels import product, small_product
from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.product_launch import ProductLaunch
from llmos_fast.kernels.small_product import SmallLaunch

from llmos_fast import ops, reference
from llmos_fast.ops.ffn import ACTIVATIONS
from llmos_fast.testing import (
    assert_close_to_truth,
    assert_within_budget,
    outputs_and_gradients,
    random,
    registered_calls,
)

OPS = ("ffn", "gated_ffn")


def call(op, rows=70, features=33, hidden=50, out=20, dtype=torch.float32, without=()):
    """Tensors of a call; ``without`` names some of them that stay away."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    if op == "ffn":
        shapes = {"w1": (hidden, features), "b1": (hidden,), "w2": (out, hidden), "b2": (out,)}
    else:
        shapes = dict.fromkeys(("w_gate", "w_up"), (hidden, features))
        shapes |= {"w_down": (out, hidden), "b_gate": (hidden,), "b_up": (hidden,)}
        shapes["b_down"] = (out,)
    shapes |= {"x": (*rows, features), "residual": (*rows, out)}
    return {
        name: None if name in without else random(*shape, dtype=dtype, requires_grad=True)
        for name, shape in shapes.items()
        if name not in without or name.startswith("b")
    }


def check(op, tensors, **options):
    longest = max(max(t.shape) for t in tensors.values() if t is not None)
    assert_within_budget(
        getattr(ops, op),
        getattr(reference, op),
        tensors,
        options,
        impl="triton",
        reduction=2 * max(longest, tensors["x"][..., :1].numel()),
    )


FEATURES = {
    "dropout": {"dropout_p": 0.3},
    "recompute": {"recompute": True},
    "few rows": {"rows": 9},
    "two dimensions of rows": {"rows": (3, 30)},
    "no biases": {"without": ("b1", "b2", "b_gate", "b_up", "b_down")},
    "no residual": {"without": ("residual",)},
    "silu": {"activation": "silu"},
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "names", [(), *((n,) for n in FEATURES), *combinations(FEATURES, 2)], ids=str
)
def test_features_and_pairs(op, names):
    chosen = {"without": ()}
    for name in names:
        feature = dict(FEATURES[name])
        feature["without"] = chosen["without"] + feature.get("without", ())
        chosen |= feature
    options = {n: chosen.pop(n) for n in ("dropout_p", "recompute", "activation") if n in chosen}
    check(op, call(op, **chosen, dtype=torch.bfloat16), **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_activations(op, activation, recompute, dtype):
    check(op, call(op, dtype=dtype), activation=activation, recompute=recompute)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [9, 70])
def test_fp16(op, rows):
    check(op, call(op, rows, dtype=torch.float16), dropout_p=0.2)


TILINGS = [
    ProductLaunch(16, 16, 16, 4, 1, PART=16, GROUP_M=1),
    ProductLaunch(64, 32, 32, 4, 1, PART=8, GROUP_M=2),
    ProductLaunch(32, 64, 64, 4, 1, PART=16, GROUP_M=8, TMA=True),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("launch", TILINGS, ids=str)
def test_any_tiling(op, launch, recompute):
    with forced(product=launch, ffn_backward=launch):
        # columns of whole 16 bytes: what TMA needs
        tensors = call(op, rows=100, features=40, hidden=72, out=24, dtype=torch.bfloat16)
        check(op, tensors, dropout_p=0.3, recompute=recompute)


def test_tma_writes_no_rows_that_begin_within_16_bytes(monkeypatch):
    used = []
    launch = product.launch

    def note(*arguments, **options):
        used.append((options["n_size"], options["TMA"]))
        launch(*arguments, **options)

    monkeypatch.setattr(product, "launch", note)
    with forced(product=TILINGS[2]):
        check("ffn", call("ffn", 100, features=40, hidden=72, out=21))
    assert (72, True) in used
    assert (21, False) in used
    assert (21, True) not in used


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rows", "block_k"), [(1, 16), (16, 32), (17, 16), (64, 32)])
def test_few_rows_split_the_reduction(op, rows, block_k, dtype):
    assert rows <= small_product.MAX_ROWS
    with forced(small_product=SmallLaunch(16, 32, block_k, 4, 1)):
        check(op, call(op, rows, features=170, hidden=100, out=20, dtype=dtype), dropout_p=0.3)


def test_counters_are_left_at_zero():
    from llmos_fast.kernels import runtime

    check("ffn", call("ffn", 9, features=250, hidden=170))
    assert runtime._counters
    assert not any(counters.any() for counters in runtime._counters.values())


@settings(max_examples=20, deadline=None)
@given(
    op=st.sampled_from(OPS),
    # a gradient of fewer than 8 elements may have cancelled to less than its own rounding
    sizes=st.tuples(st.integers(1, 100), *[st.integers(8, 80)] * 3),
    activation=st.sampled_from(ACTIVATIONS),
    dropout_p=st.sampled_from([0.0, 0.5, 1.0]),
    recompute=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size(op, sizes, activation, dropout_p, recompute, dtype):
    tensors = call(op, *sizes, dtype=dtype)
    check(op, tensors, activation=activation, dropout_p=dropout_p, recompute=recompute)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", ["rows", "features", "hidden", "out"])
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_in_one_dimension(op, size, recompute):
    check(op, call(op, **{size: 0}), dropout_p=0.1, recompute=recompute)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [9, 70])
def test_any_strides(op, rows):
    tensors = {
        name: random(*(2 * s for s in t.shape)).mT[tuple(slice(None, s) for s in t.mT.shape)].mT
        if t.dim() == 2
        else random(2 * t.shape[0])[::2]
        for name, t in call(op, rows).items()
    }
    assert not any(t.is_contiguous() for t in tensors.values())
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    plain = {n: t.detach().contiguous().requires_grad_() for n, t in tensors.items()}
    wide = {n: t.detach().double().contiguous().requires_grad_() for n, t in tensors.items()}
    eager, truth = (outputs_and_gradients(getattr(reference, op), t, {}) for t in (plain, wide))
    for recompute in (False, True):
        options = {"recompute": recompute, "impl": "triton"}
        out, gradients = outputs_and_gradients(getattr(ops, op), tensors, options)
        assert_close_to_truth(out[0], eager[0][0], truth[0][0], reduction=2 * 70)
        for name, gradient in gradients.items():
            assert_close_to_truth(
                gradient, eager[1][name], truth[1][name], reduction=2 * 70, name=name
            )


@pytest.mark.parametrize("op", OPS)
def test_an_expanded_gradient(op):
    """That of a sum has stride 0 everywhere."""
    tensors = call(op)
    gradients = {}
    for impl in ("triton", "reference"):
        out = getattr(ops, op)(**tensors, impl=impl)
        gradients[impl] = torch.autograd.grad(out.sum(), tensors.values())
    wide = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    truth = torch.autograd.grad(getattr(reference, op)(**wide).sum(), wide.values())
    for ours, eager, true in zip(gradients["triton"], gradients["reference"], truth, strict=True):
        assert_close_to_truth(ours, eager, true, reduction=2 * 70)


@pytest.mark.parametrize("op", OPS)
def test_only_the_gradients_that_are_asked_for(op):
    for wanted in call(op):
        tensors = {n: t.detach().requires_grad_(n == wanted) for n, t in call(op).items()}
        check(op, tensors, dropout_p=0.2)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_agree_in_every_bit(op, dtype):
    tensors = call(op, rows=100, dtype=dtype)
    options = {"dropout_p": 0.3, "impl": "triton"}
    first, second = (outputs_and_gradients(getattr(ops, op), tensors, options) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


@pytest.mark.parametrize("op", OPS)
def test_what_stays_in_memory(op):
    """As large as the hidden layer: the arguments of the activation, or nothing."""
    for recompute, planes in ((False, 1 if op == "ffn" else 2), (True, 0)):
        tensors = call(op)
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            getattr(ops, op)(**tensors, recompute=recompute, dropout_p=0.1, impl="triton")
        assert kept.count((70, 50)) == planes


# that numpy, which interprets, would tell of
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_extreme_inputs_stay_finite():
    x = torch.tensor([[-1e30, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 1e15]])
    eye = torch.eye(8)
    for activation in ACTIVATIONS:
        ours = ops.ffn(x, eye, None, eye, None, activation=activation, impl="triton")
        theirs = reference.ffn(x, eye, None, eye, None, activation=activation)
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite), activation
        torch.testing.assert_close(ours[finite], theirs[finite])


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_no_gradient_at_zero(activation):
    """Of a ReLU, as torch has it."""
    tensors = call("ffn", without=("b1",))
    with torch.no_grad():
        tensors["x"][:40] = 0.0
    out = ops.ffn(**tensors, activation=activation, impl="triton")
    (d_x,) = torch.autograd.grad(out.sum(), tensors["x"])
    assert not d_x[:40].any()
    assert d_x[40:].any()


@pytest.mark.parametrize("op", OPS)
def test_nan_is_not_swallowed(op):
    for activation in ACTIVATIONS:
        tensors = call(op)
        with torch.no_grad():
            tensors["x"][3, 5] = torch.nan
        out = getattr(ops, op)(**tensors, activation=activation, impl="triton")
        assert out[3].isnan().all()
        assert not out[4].isnan().any()


# as registered ops


def recorded(op, recompute):
    """Every registered op that a call and its gradients reach, with its arguments."""
    options = {"dropout_p": 0.25, "recompute": recompute, "impl": "triton"}
    with registered_calls() as calls:
        outputs_and_gradients(getattr(ops, op), call(op, 9, 6, 8, 4), options)
    return calls


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck(op, recompute):
    calls = recorded(op, recompute)
    assert set(calls) == {f"llmos_fast::{op}_triton", f"llmos_fast::{op}_triton_backward"}
    for function, arguments in calls.values():
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(function, plain)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(op, recompute, dtype):
    torch._dynamo.reset()
    tensors = call(op, (3, 5), dtype=dtype)
    options = {"activation": "gelu_tanh", "recompute": recompute, "impl": "triton"}
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    eager_out, eager_gradients = outputs_and_gradients(getattr(ops, op), tensors, options)
    out, gradients = outputs_and_gradients(compiled, tensors, options)
    assert torch.equal(out[0], eager_out[0])
    for name, gradient in gradients.items():
        assert torch.equal(gradient, eager_gradients[name]), name


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients(op):
    def second(function, tensors, **options):
        torch.manual_seed(0)
        out = function(**tensors, dropout_p=0.25, **options)
        first = torch.autograd.grad(out.square().sum(), tensors.values(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors.values())

    tensors = call(op, 9, 6, 8, 4)
    ours = second(getattr(ops, op), tensors, impl="triton")
    eager = second(getattr(reference, op), tensors)
    wide = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    truth = second(getattr(reference, op), wide)
    for out, low, true in zip(ours, eager, truth, strict=True):
        # both differentiations, of up to 2 x 9 terms each
        assert_close_to_truth(out, low, true, reduction=18 * 18)


@pytest.mark.parametrize("op", OPS)
def test_shapes_under_fake_tensors(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = {n: torch.empty(t.shape, device="cuda") for n, t in call(op, (2, 9)).items()}
        tensors = [fake.pop("x").flatten(0, 1), *fake.values()]
        residual = tensors.pop().flatten(0, 1)
        function = getattr(torch.ops.llmos_fast, f"{op}_triton")
        if op == "gated_ffn":
            order = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")
            tensors = [tensors[0], *(fake[n] for n in order)]
        out, *pre = function(*tensors, residual, None, "gelu", 0.0, True)
    assert out.shape == (18, 20)
    assert out.device.type == "cuda"
    assert {tuple(p.shape) for p in pre} == {(18, 50)}
