"""AdamW in one pass: torch's results, torch's state, and torch's own step without a kernel."""

import copy

import pytest
import torch
from torch import nn

import llmos_fast
from llmos_fast import _C, optim
from llmos_fast.optim import AdamW
from llmos_fast.testing import assert_close_to_truth, random

# tails of a vector, of a block, several blocks, nothing, a scalar
SHAPES = [(7,), (33, 5), (16384,), (16385,), (3, 20000), (0, 4), ()]
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
LENGTH = sum(torch.Size(shape).numel() for shape in SHAPES)


def values(shape, seed):
    return random(torch.Size(shape).numel(), seed=seed).reshape(shape)


def make(kind=AdamW, dtype=torch.float32, as_if=None, **settings):
    """An optimizer over two groups of parameters, the same ones for every ``kind``.

    as_if: the dtype to which values are rounded before they become ``dtype``
    """
    parameters = [
        nn.Parameter(values(shape, i).to(as_if or dtype).to(dtype))
        for i, shape in enumerate(SHAPES)
    ]
    groups = [{"params": parameters[:3]}, {"params": parameters[3:], "lr": 3e-3}]
    return kind(groups, **SETTINGS | settings)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer, step, as_if=None):
    for i, p in enumerate(parameters_of(optimizer)):
        p.grad = values(p.shape, 100 * step + i).to(as_if or p.dtype).to(p.dtype)


def train(optimizer, steps=20, first=1, as_if=None, max_norm=None):
    """Steps with gradients that depend on their number; returns the norms."""
    norms = []
    for step in range(first, first + steps):
        set_gradients(optimizer, step, as_if)
        if isinstance(optimizer, AdamW):
            optimizer.step(max_norm=max_norm)
            norms.append(optimizer.grad_norm)
        else:
            if max_norm is not None:
                norms.append(nn.utils.clip_grad_norm_(parameters_of(optimizer), max_norm))
            optimizer.step()
    return norms


def tensors_of(optimizer):
    """Parameters and state, by name."""
    found = {}
    for i, p in enumerate(parameters_of(optimizer)):
        found[f"parameter {i}"] = p.detach()
        for name, value in optimizer.state[p].items():
            found[f"{name} {i}"] = value
    return found


def assert_same(ours, theirs):
    ours, theirs = tensors_of(ours), tensors_of(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_within_budget(ours, eager, truth, dtype, reduction):
    ours, eager, truth = tensors_of(ours), tensors_of(eager), tensors_of(truth)
    assert ours.keys() == eager.keys() == truth.keys()
    for name, value in ours.items():
        if name.startswith("step"):
            assert torch.equal(value, eager[name])
            continue
        assert value.dtype == dtype
        assert_close_to_truth(value, eager[name], truth[name], reduction=reduction, name=name)


@pytest.fixture(params=_C.cpu_sets())
def every_cpu(request):
    before = _C.forced_cpu()
    _C.force_cpu(request.param)
    yield
    _C.force_cpu(before)


@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["plain", "clipped"])
def test_twenty_steps(every_cpu, dtype, max_norm):
    ours, eager = make(dtype=dtype), make(torch.optim.AdamW, dtype)
    truth = make(torch.optim.AdamW, torch.float64, as_if=dtype)
    assert ours.refusal() is None
    norms = [train(o, as_if=dtype, max_norm=max_norm) for o in (ours, eager, truth)]
    assert_within_budget(ours, eager, truth, dtype, reduction=20)
    if max_norm is not None:
        ours_norm, eager_norm, true_norm = (torch.stack(n) for n in norms)
        assert_close_to_truth(ours_norm, eager_norm, true_norm, reduction=LENGTH, dtype=dtype)


def test_the_number_of_threads_changes_nothing(dtype):
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append((make(dtype=dtype), []))
            made[-1][1].extend(train(made[-1][0], 3, max_norm=0.5))
    finally:
        torch.set_num_threads(before)
    for optimizer, norms in made[1:]:
        assert torch.equal(torch.stack(norms), torch.stack(made[0][1]))
        assert_same(optimizer, made[0][0])


def test_clipping_leaves_the_gradients_alone():
    optimizer, plain = make(), make()
    set_gradients(optimizer, 1)
    before = [p.grad.clone() for p in parameters_of(optimizer)]
    optimizer.step(max_norm=0.1)
    for p, gradient in zip(parameters_of(optimizer), before, strict=True):
        assert torch.equal(p.grad, gradient)
    # where the norm is small enough, clipping is nothing at all
    optimizer = make()
    train(optimizer, 3, max_norm=1e9)
    train(plain, 3)
    assert_same(optimizer, plain)
    assert plain.grad_norm is None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_norms_that_are_not_finite(bad):
    results = []
    for kind in (AdamW, torch.optim.AdamW):
        optimizer = make(kind)
        set_gradients(optimizer, 1)
        parameters_of(optimizer)[1].grad[0, 0] = bad
        if kind is AdamW:
            optimizer.step(max_norm=1.0)
            assert not torch.isfinite(optimizer.grad_norm)
        else:
            nn.utils.clip_grad_norm_(parameters_of(optimizer), 1.0)
            optimizer.step()
        results.append(tensors_of(optimizer))
    for name, value in results[0].items():
        assert torch.equal(value.isnan(), results[1][name].isnan()), name


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_bad_norm(max_norm):
    with pytest.raises(ValueError, match=r"AdamW\.step: max_norm must be above 0, got"):
        make().step(max_norm=max_norm)


@pytest.mark.parametrize("way", ["from torch", "to torch"])
def test_state_goes_both_ways(dtype, way):
    """Ten steps of one and ten of the other are within the budget of twenty."""
    kinds = (torch.optim.AdamW, AdamW) if way == "from torch" else (AdamW, torch.optim.AdamW)
    first, second = make(kinds[0], dtype), make(kinds[1], dtype)
    eager = make(torch.optim.AdamW, dtype)
    truth = make(torch.optim.AdamW, torch.float64, as_if=dtype)
    for optimizer in (first, eager, truth):
        train(optimizer, 10, as_if=dtype)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for new, old in zip(parameters_of(second), parameters_of(first), strict=True):
            new.copy_(old)
    assert_same(second, first)
    for optimizer in (second, eager, truth):
        train(optimizer, 10, first=11, as_if=dtype)
    assert_within_budget(second, eager, truth, dtype, reduction=20)


def test_schedulers_closures_and_tensor_rates():
    def step(optimizer, scheduler, step):
        def closure():
            assert torch.is_grad_enabled()
            set_gradients(optimizer, step)
            return step

        assert optimizer.step(closure) == step
        scheduler.step()

    made = []
    for lr in (1e-2, torch.tensor(1e-2)):
        optimizer = AdamW([nn.Parameter(random(40, 3, seed=0))], lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for number in range(1, 4):
            step(optimizer, scheduler, number)
        assert optimizer.refusal() is None
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2 / 8)
        made.append(optimizer)
    eager = torch.optim.AdamW([nn.Parameter(random(40, 3, seed=0))], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(eager, 0.5)
    for number in range(1, 4):
        step(eager, scheduler, number)
    for optimizer in made:
        torch.testing.assert_close(parameters_of(optimizer), parameters_of(eager))


@pytest.mark.parametrize("settings", [{}, {"maximize": True}], ids=["native", "torch's"])
def test_hooks_run_once(settings):
    make(torch.optim.AdamW)  # torch wraps the step of its class now
    make(torch.optim.Adam)
    optimizer, seen = make(**settings), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, 1, max_norm=1.0)
    assert seen == ["before", "after"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"amsgrad": True}, "needs amsgrad=False, got True"),
        ({"maximize": True}, "needs maximize=False"),
        ({"differentiable": True}, "needs differentiable=False"),
        ({"foreach": True}, "needs foreach=False"),
        ({"fused": True}, "needs fused=False"),
        ({"dtype": torch.float64}, "needs float32 or bfloat16, got torch.float64"),
        ({"dtype": torch.float16}, "needs float32 or bfloat16, got torch.float16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_norm", [None, 0.5], ids=["plain", "clipped"])
def test_torchs_own_step(settings, reason, max_norm):
    differentiable = settings.get("differentiable", False)
    made = [make(kind, **settings) for kind in (AdamW, torch.optim.AdamW)]
    for optimizer in made:
        if differentiable:  # torch refuses to write into leaves
            for p in parameters_of(optimizer):
                p.requires_grad_(False)
        train(optimizer, 3, max_norm=max_norm)
    assert reason in made[0].refusal()
    assert_same(*made)


def test_layouts():
    transposed = nn.Parameter(random(6, 4, seed=0).T)
    optimizer = AdamW([transposed])
    transposed.grad = torch.ones(4, 6)
    assert optimizer.refusal() == "needs contiguous tensors, got strides (1, 4)"
    optimizer.step()
    sparse = nn.Parameter(torch.zeros(3, 2))
    optimizer = AdamW([sparse])
    sparse.grad = torch.eye(3, 2).to_sparse()
    assert "needs strided tensors" in optimizer.refusal()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    complex_ = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = AdamW([complex_])
    complex_.grad = torch.ones_like(complex_)
    assert "needs float32 or bfloat16, got torch.complex64" in optimizer.refusal()
    optimizer.step()
    assert complex_.detach().real.lt(0).all()


def test_what_has_no_gradient_stays():
    optimizer = make()
    set_gradients(optimizer, 1)
    still = parameters_of(optimizer)[2]
    still.grad, before = None, still.detach().clone()
    optimizer.step(max_norm=1.0)
    assert torch.equal(still, before)
    assert still not in optimizer.state
    make().step(max_norm=1.0)  # nor is there anything to do where nothing has one


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(optim, "_native", None)
    made = [make(kind) for kind in (AdamW, torch.optim.AdamW)]
    assert "is not built" in made[0].refusal()
    for optimizer in made:
        train(optimizer, 2, max_norm=0.5)
    assert_same(*made)


def test_autograd_sees_the_update():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    loss = (p * p).sum()
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# torch's compiler imports what torch has deprecated
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_under_compile():
    made = [make(kind) for kind in (AdamW, torch.optim.AdamW)]
    for optimizer in made:
        set_gradients(optimizer, 1)
    torch.compile(made[0].step, backend="eager")()
    made[1].step()
    torch.testing.assert_close(tensors_of(made[0]), tensors_of(made[1]))


def test_a_step_cannot_be_captured():
    optimizer = make()
    set_gradients(optimizer, 1)

    def step(x):
        optimizer.step()
        return x

    with pytest.raises(ValueError, match="capture: function must consist of native ops"):
        llmos_fast.capture(step, torch.zeros(1))
