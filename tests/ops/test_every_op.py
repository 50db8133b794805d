"""What must hold for each op alike: gradients of gradients, registration, compilation, autocast."""

import pytest
import torch

from llmos_fast import explain, ops, reference
from llmos_fast.testing import (
    assert_close_to_truth,
    outputs_and_gradients,
    random,
    registered_calls,
)

GRAD = {"requires_grad": True}


def _case(op, dtype=torch.float32):
    """(tensors, options) of one small call of ``op`` that uses most of what it has."""

    def r(*shape):
        return random(*shape, dtype=dtype, requires_grad=True)

    cases = {
        "attention": lambda: (
            {
                "query": r(2, 4, 5, 8),
                "key": r(2, 2, 7, 8),
                "value": r(2, 2, 7, 6),
                "bias": random(1, 4, 1, 7, dtype=dtype, requires_grad=True),
                "sinks": random(4, dtype=dtype, requires_grad=True),
                "key_lengths": torch.tensor([7, 5]),
            },
            {"causal": "bottom_right", "softcap": 4.0, "dropout_p": 0.25, "return_lse": True},
        ),
        "attention_weights": lambda: (
            {
                "query": r(2, 4, 5, 8),
                "key": r(2, 2, 7, 8),
                "value": r(2, 2, 7, 6),
                "bias": random(1, 4, 1, 7, dtype=dtype, requires_grad=True),
                "sinks": random(4, dtype=dtype, requires_grad=True),
                "key_lengths": torch.tensor([7, 5]),
            },
            {"causal": "bottom_right", "softcap": 4.0, "dropout_p": 0.25, "average_heads": True},
        ),
        "embedding": lambda: (
            {
                "ids": torch.tensor([[3, 0, 8, 3, 3]] * 3),
                "weight": r(9, 6),
                "positions": r(5, 6),
            },
            {"scale": 3.0, "dropout_p": 0.25},
        ),
        "ffn": lambda: (
            {"x": r(3, 5, 6), "w1": r(9, 6), "b1": r(9), "w2": r(4, 9), "b2": r(4)},
            {"activation": "gelu", "dropout_p": 0.25},
        ),
        "gated_ffn": lambda: (
            {
                "x": r(3, 5, 6),
                "w_gate": r(9, 6),
                "w_up": r(9, 6),
                "w_down": r(4, 9),
                "b_gate": r(9),
                "b_up": r(9),
                "b_down": r(4),
            },
            {"activation": "silu", "dropout_p": 0.25},
        ),
        "add_norm": lambda: (
            {"x": r(3, 5, 6), "residual": r(3, 5, 6), "weight": r(6), "bias": r(6)},
            {"dropout_p": 0.25},
        ),
        "dropout": lambda: ({"x": r(3, 5, 6), "residual": r(3, 5, 6)}, {"p": 0.25}),
        "rotary": lambda: (
            {
                "query": r(2, 4, 5, 8),
                "key": r(2, 2, 5, 8),
                "cos": random(5, 3, dtype=dtype),
                "sin": random(5, 3, dtype=dtype),
            },
            {},
        ),
        "linear": lambda: ({"x": r(3, 5, 6), "weight": r(4, 6), "bias": r(4)}, {}),
        "linear_cross_entropy": lambda: (
            {
                "hidden": r(3, 5, 6),
                "weight": r(9, 6),
                "bias": r(9),
                "target": torch.tensor([[0, 8, -100, 3, 4]] * 3),
            },
            {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0},
        ),
    }
    return cases[op]()


OPS = [
    "add_norm",
    "attention",
    "attention_weights",
    "dropout",
    "embedding",
    "ffn",
    "gated_ffn",
    "linear",
    "linear_cross_entropy",
    "rotary",
]


def test_every_op_is_covered():
    # not every tensor of these has a gradient: files of their own test what is tested here
    others = {"attention_decode", "cache_write", "quant_embedding", "quant_matmul"}
    assert set(ops.__all__) - others == set(OPS)


def _differentiable(op, call):
    """A function of the tensors that need gradients alone, with the same dropout at each call."""
    tensors, options = call
    wanted = [name for name, t in tensors.items() if t.requires_grad]

    def function(*values):
        torch.manual_seed(0)
        result = op(**(tensors | dict(zip(wanted, values, strict=True))), **options)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(r for r in results if r.requires_grad)

    return function, [tensors[name] for name in wanted]


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_the_definition(op):
    function, values = _differentiable(getattr(reference, op), _case(op, torch.float64))
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


# dropout, embedding and rotary are linear in their inputs
@pytest.mark.parametrize("op", [op for op in OPS if op not in ("dropout", "embedding", "rotary")])
def test_gradients_of_gradients(op):
    """Differentiating the gradients of the kernels gives what the definition gives."""

    def second(function, values):
        generator = torch.Generator().manual_seed(1)
        results = function(*values)
        directions = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
        first = torch.autograd.grad(results, values, directions, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        return torch.autograd.grad(penalty, values, allow_unused=True)

    tensors, options = _case(op)
    wide = {
        n: t.detach().double().requires_grad_() if t.requires_grad else t
        for n, t in tensors.items()
    }
    truth = second(*_differentiable(getattr(reference, op), (wide, options)))
    eager = second(*_differentiable(getattr(reference, op), (tensors, options)))
    native = lambda **kw: getattr(ops, op)(**kw, impl="native")  # noqa: E731
    ours = second(*_differentiable(native, (tensors, options)))
    for out, low, true in zip(ours, eager, truth, strict=True):
        if true is None:
            assert out is None or not out.any()
        else:
            # the reduction counts both differentiations, each of up to 100 terms
            assert_close_to_truth(out, low, true, reduction=10_000)


@pytest.mark.parametrize("op", ["add_norm", "attention", "attention_weights"])
def test_one_tensor_in_several_places_counts_once_in_each(op):
    x = random(1, 2, 5, 8, requires_grad=True)
    places = (x, x, torch.ones(8)) if op == "add_norm" else (x, x, x)

    def gradient(create_graph):
        results = getattr(ops, op)(*places, impl="native")
        results = results if isinstance(results, tuple) else (results,)
        loss = sum(r.square().sum() for r in results)
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0]

    torch.testing.assert_close(gradient(create_graph=True), gradient(create_graph=False))


@pytest.mark.parametrize("op", OPS)
def test_native_runs_by_default(op):
    tensors, options = _case(op)
    if op == "dropout":
        tensors = {"x": tensors["x"], "residual": tensors["residual"]}
    assert explain(getattr(ops, op), **tensors, **options)[0] == ("native", None)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(op, dtype):
    torch._dynamo.reset()
    tensors, options = _case(op, dtype)
    options = {**options, "impl": "native"}
    if "dropout_p" in options:
        options["dropout_p"] = 0.0  # a compiled graph draws its seeds in another order
    if op == "dropout":
        options["p"] = 0.0
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    eager_out, eager_gradients = outputs_and_gradients(getattr(ops, op), tensors, options)
    out, gradients = outputs_and_gradients(compiled, tensors, options)
    for ours, theirs in zip(out, eager_out, strict=True):
        assert torch.equal(ours, theirs)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, eager_gradients[name]), name


@pytest.mark.parametrize(
    "op", [op for op in OPS if op not in ("linear", "linear_cross_entropy", "rotary")]
)
def test_compiled_dropout_draws_anew(op):
    torch._dynamo.reset()
    tensors, options = _case(op)
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    first, second = (
        (r[0] if isinstance(r, tuple) else r)
        for r in (compiled(**tensors, **options), compiled(**tensors, **options))
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "op", [op for op in OPS if op not in ("add_norm", "dropout", "embedding", "rotary")]
)
def test_autocast_casts_to_bf16(op):
    tensors, options = _case(op)
    if op in ("attention", "attention_weights"):
        tensors |= {"bias": None, "sinks": None}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = getattr(ops, op)(**tensors, **options)
    result = result[0] if isinstance(result, tuple) else result
    assert result.dtype == (torch.float32 if op == "linear_cross_entropy" else torch.bfloat16)
    result.float().sum().backward()
    assert all(
        t.grad.dtype == torch.float32 for t in tensors.values() if t is not None and t.requires_grad
    )


class _Cut(torch.autograd.Function):
    """What lies before it gets no gradient at all."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        return None


@pytest.mark.parametrize("op", OPS)
def test_results_without_gradient_give_none(op):
    tensors, options = _case(op)
    result = getattr(ops, op)(**tensors, **options, impl="native")
    results = result if isinstance(result, tuple) else (result,)
    sum(_Cut.apply(r).sum() for r in results).backward()
    assert all(t.grad is None for t in tensors.values() if t is not None)


@pytest.mark.parametrize("op", OPS)
def test_same_seed_same_bits_and_thread_count_does_not_matter(op):
    tensors, options = _case(op)
    options = {**options, "impl": "native"}
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(outputs_and_gradients(getattr(ops, op), tensors, options, seed=5))
    finally:
        torch.set_num_threads(before)
    for outputs, gradients in runs[1:]:
        for ours, first in zip(outputs, runs[0][0], strict=True):
            assert torch.equal(ours, first)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, runs[0][1][name]), name


def _registered_calls():
    """Every registered op with arguments for it, recorded from real calls."""
    with registered_calls() as calls:
        for op in OPS:
            tensors, options = _case(op)
            for extra in ({"reduction": "none"}, {}) if op == "linear_cross_entropy" else ({},):
                outputs_and_gradients(
                    getattr(ops, op), tensors, options | extra | {"impl": "native"}
                )
    return calls


def test_opcheck():
    calls = _registered_calls()
    assert {name.split("::")[1] for name in calls} >= {
        "add_norm",
        "add_norm_backward",
        "attention",
        "attention_backward",
        "attention_weights",
        "dropout",
        "ffn",
        "ffn_hidden_backward",
        "gated_ffn_hidden_backward",
        "gated_ffn",
        "linear_cross_entropy",
        "linear_cross_entropy_rows",
        "linear_cross_entropy_rows_backward",
        "product",
        "rotary",
    }
    for function, arguments in calls.values():
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(function, plain)


@pytest.mark.parametrize("op", OPS)
def test_shapes_on_the_meta_device(op):
    tensors, options = _case(op)
    meta = {name: t.detach().to("meta") for name, t in tensors.items()}
    result = getattr(ops, op)(**meta, **{**options, "impl": "auto"})
    expected = getattr(ops, op)(**tensors, **options)
    if not isinstance(result, tuple):
        result, expected = (result,), (expected,)
    assert [r.shape for r in result] == [e.shape for e in expected]


def test_torch_func_and_tracing_take_the_definition():
    x, weight = random(5, 4), random(3, 4)

    def loss(w):
        return ops.linear(x, w).square().sum()

    gradient = torch.func.grad(loss)(weight)
    leaf = weight.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(gradient, leaf.grad)
    each = torch.func.vmap(lambda row: ops.linear(row, weight))(x)
    torch.testing.assert_close(each, ops.linear(x, weight))


def test_bf16_and_fp64_take_the_expected_way():
    x = random(2, 3, dtype=torch.float64)
    assert explain(ops.linear, x, random(4, 3, dtype=torch.float64)) == [
        ("native", "needs float32 or bfloat16, got torch.float64"),
        ("reference", None),
    ]
