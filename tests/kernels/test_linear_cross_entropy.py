"""linear_cross_entropy on the GPU kernels: features, tilings, sizes, and as registered ops."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from llmos_fast.kernels import linear_cross_entropy_backward as backward
from llmos_fast.kernels import linear_cross_entropy_forward as forward
from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.product_launch import ProductLaunch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmos_fast import ops, reference
from llmos_fast.testing import (
    assert_close_to_truth,
    assert_within_budget,
    outputs_and_gradients,
    random,
    registered_calls,
)


def call(rows=40, features=20, classes=90, dtype=torch.float32, bias=True, ignore_index=-100):
    """Tensors of a call; some of the targets are ignored."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    grad = {"dtype": dtype, "requires_grad": True}
    target = torch.randint(0, classes, rows)
    target.view(-1)[1::5] = ignore_index
    return {
        "hidden": random(*rows, features, **grad),
        # logits of a few units: neither is a class certain nor are all alike
        "weight": random(classes, features, scale=2 * max(features, 1) ** -0.5, **grad),
        "target": target,
        "bias": random(classes, **grad) if bias else None,
    }


def check(tensors, **options):
    longest = max(*tensors["weight"].shape, tensors["target"].numel())
    assert_within_budget(
        ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        tensors,
        options,
        impl="triton",
        reduction=longest,
    )


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of 64 classes, so that small calls have several."""
    monkeypatch.setattr(backward, "CHUNK_MULTIPLE", 64)
    monkeypatch.setattr(backward, "CHUNK_BYTES", 0)


FEATURES = {
    "no bias": {"bias": False},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 3.0},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "an ignored class": {"ignore_index": 1},
}


@pytest.mark.parametrize(
    "names", [(), *((n,) for n in FEATURES), *combinations(FEATURES, 2)], ids=str
)
def test_features_and_pairs(names, chunks):
    chosen = {name: value for feature in names for name, value in FEATURES[feature].items()}
    tensors = call(
        dtype=torch.bfloat16,
        bias=chosen.pop("bias", True),
        ignore_index=chosen.get("ignore_index", -100),
    )
    check(tensors, **chosen)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_dimensions_of_rows(reduction):
    check(call((3, 12)), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dtypes(reduction, dtype, chunks):
    options = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 4.0, "reduction": reduction}
    check(call(70, 33, 150, dtype=dtype), **options)


TILINGS = [
    ProductLaunch(16, 16, 16, 4, 1, PART=16, GROUP_M=1),
    ProductLaunch(64, 32, 32, 4, 1, PART=8, GROUP_M=2),
    ProductLaunch(32, 64, 64, 4, 1, PART=16, GROUP_M=8, TMA=True),
]


@pytest.mark.parametrize("launch", TILINGS, ids=str)
# columns of whole 16 bytes are what TMA needs; without, it is switched off
@pytest.mark.parametrize("features", [72, 33])
def test_any_tiling(launch, features, chunks):
    names = ("cross_entropy_forward", "cross_entropy_backward", "cross_entropy_hidden")
    with forced(**dict.fromkeys(names, launch)):
        tensors = call(70, features, 100, dtype=torch.bfloat16)
        check(tensors, label_smoothing=0.1, z_loss=0.01, softcap=5.0)


@settings(max_examples=12, deadline=None)
@given(
    # of fewer than 8 classes the gradients may cancel to less than their own rounding
    sizes=st.tuples(st.integers(2, 80), st.integers(8, 70), st.integers(8, 120)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_size(sizes, reduction, smoothing, dtype):
    check(call(*sizes, dtype=dtype), reduction=reduction, label_smoothing=smoothing)


def test_one_row_spreads_over_the_programs():
    check(call((2,), 16, 300), label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_of_more_blocks_than_are_added_at_a_time(reduction, monkeypatch):
    monkeypatch.setattr(forward, "JOINED_ROWS", 16)
    monkeypatch.setattr(forward, "BLOCK_SUMS", 2)
    check(call(70, 16, 30), reduction=reduction)


@pytest.mark.parametrize("row_tiles", [1, 3, 100, 132, 133, 500])
@pytest.mark.parametrize("class_tiles", [1, 2, 197, 1000])
def test_parts_cover_the_classes_and_leave_few_programs_idle(row_tiles, class_tiles):
    each = forward.tiles_of_a_part(row_tiles, class_tiles, 132)
    parts = -(-class_tiles // each)
    assert (parts - 1) * each < class_tiles <= parts * each
    time = -(-row_tiles * parts // 132) * each
    assert time <= -(-row_tiles // 132) * class_tiles
    if class_tiles > 132:
        assert row_tiles * class_tiles / 132 / time > 0.7


def test_chunks_are_bounded_and_never_narrow():
    size = backward.chunk_size
    assert size(8192, 768, 50257, 2) == 2**27 // 8192 // 2
    assert size(16, 768, 50257, 2) == 50257
    assert size(10000, 768, 50257, 2) == 2**27 // 10000 // 2 // 256 * 256
    # at least as many as features: adding up d_hidden stays a small part of the products
    assert size(2**17, 4096, 128256, 2) == 4096
    assert size(2**27, 64, 128256, 2) == 256


@torch.no_grad()
def test_labels_far_from_the_vocabulary_choose_no_logit():
    """On a GPU nobody has looked at them before the kernels do."""
    tensors = call(6, 16, 40)
    tensors["target"].copy_(torch.tensor([-1, 40, 2**40, -(2**63), 2**63 - 1, 3]))
    options = (-100, 0.0, 0.0, 0.0)
    op = torch.ops.llmos_fast.linear_cross_entropy_triton
    losses, lse, _ = op(*tensors.values(), *options, "none")
    torch.testing.assert_close(losses[:-1], lse[:-1] * math.log(2))
    assert losses[-1] != lse[-1] * math.log(2)
    backward_op = torch.ops.llmos_fast.linear_cross_entropy_triton_backward
    call_ = (torch.ones(6), *tensors.values(), lse, None, *options, [True, True, True])
    d_bias = backward_op(*call_)[2]
    logits = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
    expected = logits.softmax(dim=1).sum(0) - F.one_hot(torch.tensor(3), 40)
    torch.testing.assert_close(d_bias, expected)


# numpy, which interprets, tells of what comes in
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_are_zero_whatever_they_hold(reduction):
    tensors = call(40, 16, 50, bias=False)
    with torch.no_grad():
        tensors["hidden"][tensors["target"] == -100] = torch.inf
    tensors["weight"].requires_grad_(False)
    loss = ops.linear_cross_entropy(**tensors, reduction=reduction, impl="triton")
    loss.sum().backward()
    assert loss.isfinite().all()
    ignored = tensors["target"] == -100
    assert not tensors["hidden"].grad[ignored].any()
    assert tensors["hidden"].grad[~ignored].all()


def test_all_rows_ignored():
    tensors = call(9, 16, 30)
    tensors["target"].fill_(-100)
    for reduction in ("mean", "sum", "none"):
        loss = ops.linear_cross_entropy(**tensors, reduction=reduction, impl="triton")
        assert loss.isnan() if reduction == "mean" else not loss.any()
        wanted = [t for t in tensors.values() if t.requires_grad]
        for gradient in torch.autograd.grad(loss.sum(), wanted):
            assert not gradient.any()


@pytest.mark.parametrize("size", ["rows", "features"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_in_one_dimension(size, reduction):
    tensors = call(**{size: 0})
    if size == "features":
        check(tensors, reduction=reduction)
        return
    loss = ops.linear_cross_entropy(**tensors, reduction=reduction, impl="triton")
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    loss.sum().backward()
    assert tensors["hidden"].grad.shape == (0, 20)
    assert not tensors["weight"].grad.any()
    assert not tensors["bias"].grad.any()


def test_no_class_is_refused():
    tensors = call(3, 8, 5) | {"weight": random(0, 8), "bias": random(0)}
    tensors["target"] = torch.full((3,), -100)
    with pytest.raises(ValueError, match="needs at least one class, got 0"):
        ops.linear_cross_entropy(**tensors, impl="triton")


def test_classes_that_a_bias_takes_out():
    """A padded vocabulary: whole tiles of -inf. The definition has 0 inf in it, torch has not."""
    tensors = call(20, 16, 200)
    with torch.no_grad():
        tensors["bias"][:120] = -torch.inf
    tensors["target"][:10] = 150
    tensors["target"][10:] = 199

    def theirs(hidden, weight, target, bias):
        return F.cross_entropy(F.linear(hidden, weight, bias), target)

    wide = {n: t.double() if t.is_floating_point() else t.clone() for n, t in tensors.items()}
    wide = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in wide.items()}
    ours = outputs_and_gradients(ops.linear_cross_entropy, tensors, {"impl": "triton"})
    eager, truth = (outputs_and_gradients(theirs, call_, {}) for call_ in (tensors, wide))
    assert_close_to_truth(ours[0][0], eager[0][0], truth[0][0], reduction=200)
    for name, gradient in ours[1].items():
        assert_close_to_truth(gradient, eager[1][name], truth[1][name], reduction=200)


def test_any_strides(chunks):
    tensors = call(70, 33, 103)
    spread = {n: t.detach().repeat_interleave(2, dim=-1)[..., ::2] for n, t in tensors.items()}
    spread["hidden"] = tensors["hidden"].detach().t().contiguous().t()
    spread = {n: t.requires_grad_(t.is_floating_point()) for n, t in spread.items()}
    assert not any(t.is_contiguous() for t in spread.values())
    options = {"reduction": "none", "impl": "triton"}
    ours, packed = (
        outputs_and_gradients(ops.linear_cross_entropy, t, options) for t in (spread, tensors)
    )
    torch.testing.assert_close(ours, packed)


def test_an_expanded_gradient():
    """That of a sum has stride 0."""
    tensors = call()
    wanted = [t for t in tensors.values() if t.requires_grad]
    found = []
    for reduction in ("none", "sum"):
        loss = ops.linear_cross_entropy(**tensors, reduction=reduction, impl="triton").sum()
        found.append(torch.autograd.grad(loss, wanted))
    for each, whole in zip(*found, strict=True):
        assert torch.equal(each, whole)


def test_large_logits():
    """Where exponentials overflow unless the maximum is taken off."""
    tensors = call(40, 20, 90)
    with torch.no_grad():
        tensors["weight"].mul_(100)
    check(tensors)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
def test_nan_is_not_swallowed():
    tensors = call(9, 16, 30)
    with torch.no_grad():
        tensors["hidden"][3, 5] = torch.nan
    losses = ops.linear_cross_entropy(**tensors, reduction="none", impl="triton")
    assert losses.isnan().nonzero().flatten().tolist() == [3]


def test_only_the_gradients_that_are_asked_for(chunks):
    for wanted in ("hidden", "weight", "bias"):
        tensors = call(classes=150)
        for name, t in tensors.items():
            if t.is_floating_point():
                tensors[name] = t.detach().requires_grad_(name == wanted)
        check(tensors, softcap=5.0)


def test_two_runs_agree_in_every_bit(dtype, chunks):
    tensors, options = call(70, 33, 150, dtype=dtype), {"impl": "triton"}
    first, second = (
        outputs_and_gradients(ops.linear_cross_entropy, tensors, options) for _ in range(2)
    )
    assert torch.equal(first[0][0], second[0][0])
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


def test_what_stays_in_memory():
    """For the gradients, no more than a number for each row."""
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    tensors = call()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.linear_cross_entropy(**tensors, impl="triton")
    shapes = [tuple(t.shape) for t in tensors.values()]
    assert sorted(kept) == sorted([*shapes, (40,), ()])


# as registered ops

ALL = {"label_smoothing": 0.1, "z_loss": 0.05, "softcap": 4.0, "impl": "triton"}


def recorded(reduction):
    """Every registered op that a call and its gradients reach, with its arguments."""
    tensors = call(9, 6, 20)
    with registered_calls() as calls:
        outputs_and_gradients(ops.linear_cross_entropy, tensors, ALL | {"reduction": reduction})
    return calls


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    calls = recorded(reduction)
    name = "llmos_fast::linear_cross_entropy_triton"
    assert set(calls) == {name, f"{name}_backward"}
    for function, arguments in calls.values():
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(function, plain)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(reduction, dtype):
    torch._dynamo.reset()
    tensors, options = call((3, 5), 16, 40, dtype=dtype), ALL | {"reduction": reduction}
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eager_out, eager_gradients = outputs_and_gradients(ops.linear_cross_entropy, tensors, options)
    out, gradients = outputs_and_gradients(compiled, tensors, options)
    assert torch.equal(out[0], eager_out[0])
    for name, gradient in gradients.items():
        assert torch.equal(gradient, eager_gradients[name]), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_gradients(reduction):
    def second(tensors, impl):
        wanted = [t for t in tensors.values() if t.requires_grad]
        options = ALL | {"reduction": reduction, "impl": impl}
        out = ops.linear_cross_entropy(**tensors, **options)
        first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    tensors = call(9, 16, 20)
    wide = {
        n: t.detach().double().requires_grad_() if t.is_floating_point() else t
        for n, t in tensors.items()
    }
    found = (second(tensors, "triton"), second(tensors, "reference"), second(wide, "reference"))
    for out, low, true in zip(*found, strict=True):
        # both differentiations, of up to 20 terms each
        assert_close_to_truth(out, low, true, reduction=20 * 20)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_under_fake_tensors(reduction):
    with FakeTensorMode():
        fake = [
            torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for t in call(dtype=torch.bfloat16).values()
        ]
        loss, lse, count = torch.ops.llmos_fast.linear_cross_entropy_triton(
            *fake, -100, 0.0, 0.0, 0.0, reduction
        )
    assert loss.shape == ((40,) if reduction == "none" else ())
    assert {t.dtype for t in (loss, lse, count)} == {torch.float32}
    assert {t.device.type for t in (loss, lse, count)} == {"cuda"}
    assert lse.shape == (40,)
