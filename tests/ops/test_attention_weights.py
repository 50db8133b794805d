"""Attention with its weights: against the definition, one result with the other, what is held."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmos_fast import explain, library, ops, reference
from llmos_fast.testing import (
    assert_close_to_truth,
    assert_within_budget,
    outputs_and_gradients,
    random,
)

IMPLEMENTATIONS = ["native", "triton"]
EPS = torch.finfo(torch.float32).eps
SHAPES = [  # batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 63, 33, 16, 16),
    (1, 2, 1, 7, 70, 40, 36),  # two steps over head_dim, of 32 when interpreted
    (1, 2, 2, 5, 3, 8, 8),
]
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "bottom_right": {"causal": "bottom_right"},
    "window": {"window": (5, 2)},
    "mask": {"mask": True},
    "bias": {"bias": True},
    "alibi": {"alibi_slopes": True},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "lengths": {"key_lengths": True},
    "scale": {"scale": 0.7},
}


def make_call(shape, features, dtype=torch.float32):
    """(tensors, options) of the op; True stands for a tensor that fits the shape."""
    batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v = shape
    grad = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "query": random(batch, heads_q, seq_q, head_dim, **grad),
        "key": random(batch, heads_kv, seq_k, head_dim, **grad),
        "value": random(batch, heads_kv, seq_k, head_dim_v, **grad),
    }
    makers = {
        "mask": lambda: torch.rand(batch, 1, seq_q, seq_k) > 0.4,
        "bias": lambda: random(1, heads_q, seq_q, seq_k, **grad),
        "sinks": lambda: random(heads_q, **grad),
        "alibi_slopes": lambda: torch.rand(heads_q),
        "key_lengths": lambda: torch.arange(batch) * (seq_k // 2),
    }
    tensors |= {name: make() for name, make in makers.items() if name in features}
    return tensors, {name: v for name, v in features.items() if name not in makers}


def only(index):
    """(op, reference) that return one of the two results."""
    return (
        lambda **call: ops.attention_weights(**call)[index],
        lambda **call: reference.attention_weights(**call)[index],
    )


def check(shape, features, dtype, impl, average_heads, functions=None):
    tensors, options = make_call(shape, features, dtype)
    batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v = shape
    # a gradient chains two sums, over a head's features and then over keys or a group's queries;
    # that of a bias also runs over the batch
    reduction = max(head_dim, head_dim_v) * max(seq_k, heads_q // heads_kv * seq_q) * batch
    assert_within_budget(
        *(functions or (ops.attention_weights, reference.attention_weights)),
        tensors,
        options | {"average_heads": average_heads},
        impl=impl,
        reduction=reduction,
    )


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_each_feature(impl, shape, feature, average_heads, dtype):
    check(shape, FEATURES[feature], dtype, impl, average_heads)


@pytest.mark.parametrize("pair", list(itertools.combinations(sorted(FEATURES), 2)), ids="-".join)
def test_pairs_of_features_in_triton(pair):
    features = FEATURES[pair[0]] | FEATURES[pair[1]]
    check((1, 2, 1, 37, 45, 16, 16), features, torch.float32, "triton", average_heads=True)


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("index", [0, 1], ids=["out", "weights"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_through_one_result_alone(impl, index, average_heads, dtype):
    features = {"causal": "bottom_right", "dropout_p": 0.3, "bias": True, "sinks": True}
    check((2, 4, 2, 20, 35, 16, 24), features, dtype, impl, average_heads, only(index))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(8, torch.float32), (96, torch.float32), (300, torch.bfloat16), (512, torch.bfloat16)],
    ids=str,
)
def test_head_dims(head_dim, dtype):
    shape = (1, 2, 1, 33, 40, head_dim, 16)
    check(shape, {"causal": True}, dtype, "triton", average_heads=True)


def test_fp16():
    shape = (1, 4, 2, 40, 50, 24, 16)
    check(shape, {"softcap": 5.0, "dropout_p": 0.2}, torch.float16, "triton", average_heads=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_out_is_the_sum_that_the_weights_say(impl, dropout_p):
    tensors, _ = make_call((2, 4, 2, 40, 45, 16, 24), {})
    options = {"causal": "bottom_right", "dropout_p": dropout_p}
    out, weights = ops.attention_weights(**tensors, **options, impl=impl)
    value = tensors["value"].repeat_interleave(2, dim=1)
    assert_close_to_truth(out, weights @ value, weights.double() @ value.double(), reduction=45)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_draws_the_bits_of_attention(impl):
    query, key = random(2, 4, 40, 16), random(2, 2, 70, 16)
    value = torch.eye(70).expand(2, 2, 70, 70).contiguous()
    torch.manual_seed(3)
    out, weights = ops.attention_weights(query, key, value, dropout_p=0.5, impl=impl)
    # these values show the probabilities that out is summed with
    assert torch.equal(out != 0, weights != 0)
    assert 0.4 < (weights != 0).float().mean() < 0.6
    torch.manual_seed(3)
    assert torch.equal(out, ops.attention(query, key, value, dropout_p=0.5, impl=impl))
    torch.manual_seed(3)
    _, defined = reference.attention_weights(query, key, value, dropout_p=0.5)
    assert torch.equal(defined != 0, weights != 0)
    _, none = ops.attention_weights(query, key, value, dropout_p=1.0, impl=impl)
    assert not none.any()


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_sum_to_one(impl, average_heads):
    query, key, value = random(2, 4, 50, 16), random(2, 2, 70, 16), random(2, 2, 70, 8)
    _, weights = ops.attention_weights(
        query, key, value, causal="bottom_right", average_heads=average_heads, impl=impl
    )
    largest = (query.norm(dim=-1).max() * key.norm(dim=-1).max() / 4).item() + math.log(70)
    # 70 terms and 4 heads; the exponent, a difference of two numbers that were rounded before, is
    # known to 4 roundings of the largest, and the exponential turns these into relative ones
    assert (weights.sum(-1) - 1.0).abs().max() <= (70 + 4 + 4 * largest) * EPS


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("features", [{}, {"sinks": True}], ids=["plain", "sinks"])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_rows_without_a_key_give_zero_and_no_gradient(impl, features, average_heads, dtype):
    tensors, _ = make_call((2, 2, 2, 6, 9, 8, 8), features, dtype)
    mask = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False
    options = {"mask": mask, "dropout_p": 0.5, "average_heads": average_heads, "impl": impl}
    (out, weights), gradients = outputs_and_gradients(ops.attention_weights, tensors, options)
    for result in (out, weights):
        assert not result[0, ..., 2, :].any()
        assert not result[1].any()
        assert result.isfinite().all()
    for name in ("query", "key", "value"):
        assert gradients[name].isfinite().all()
        assert not gradients[name][1].any()
    assert not gradients["query"][0, :, 2].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hidden_keys_are_never_seen(impl):
    """A NaN in a hidden key would reach the whole row through the product."""
    query, key, value = (random(1, 2, 70, 16) for _ in range(3))
    call = {"key_lengths": torch.tensor([40]), "average_heads": True, "impl": impl}
    _, before = ops.attention_weights(query, key, value, **call)
    key[:, :, 40:] = torch.nan
    _, after = ops.attention_weights(query, key, value, **call)
    assert torch.equal(before, after)
    assert not after[:, :, 40:].any()


def test_any_strides():
    packed = random(2, 50, 3, 4, 16)  # batch, seq, (q, k, v), heads, head_dim
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    odd = random(2, 4, 16, 50).transpose(2, 3)  # head_dim is not the fastest dimension
    bias = random(50, 4).t()[:, None, :]
    for q in (query, odd):
        _, ours = ops.attention_weights(q, key, value, bias=bias, impl="triton")
        dense = (t.contiguous() for t in (q, key, value))
        _, same = ops.attention_weights(*dense, bias=bias.contiguous(), impl="triton")
        assert torch.equal(ours, same)


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_empty(impl, seq_q, seq_k, average_heads):
    tensors, _ = make_call((2, 2, 1, seq_q, seq_k, 8, 4), {})
    options = {"average_heads": average_heads, "impl": impl}
    (out, weights), gradients = outputs_and_gradients(ops.attention_weights, tensors, options)
    assert out.shape == (2, 2, seq_q, 4)
    assert not out.any()
    assert weights.shape == ((2, seq_q, seq_k) if average_heads else (2, 2, seq_q, seq_k))
    assert all(not g.any() for g in gradients.values())


def test_runs_are_bit_equal():
    tensors, options = make_call((2, 4, 2, 40, 50, 16, 16), {"causal": True, "dropout_p": 0.1})
    options |= {"average_heads": True, "impl": "triton"}
    first, second = (outputs_and_gradients(ops.attention_weights, tensors, options) for _ in "ab")
    for ours, again in zip(first[0], second[0], strict=True):
        assert torch.equal(ours, again)
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_weights_of_single_heads_are_never_held(monkeypatch, dropout_p):
    """Neither in the forward pass nor for the gradients of the output."""
    heads, seq = 4, 64
    monkeypatch.setattr(library, "is_plain", lambda arguments: True)  # the mode sees what is inside

    def largest(average_heads, results):
        tensors, _ = make_call((1, heads, heads, seq, seq, 8, 8), {})
        with Largest() as mode:
            both = ops.attention_weights(
                **tensors, dropout_p=dropout_p, average_heads=average_heads, impl="triton"
            )
            sum(both[i].sum() for i in results).backward()
        return mode.bytes

    plane = 4 * seq * seq
    assert largest(True, [0]) == plane
    assert largest(False, [0]) == heads * plane
    assert largest(True, [0, 1]) >= heads * plane  # the weights' gradient is the definition's


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
def test_opcheck(average_heads):
    tensors, _ = make_call((2, 4, 2, 5, 7, 8, 6), {"bias": True, "sinks": True})
    calls = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "llmos_fast":
                calls[function.name()] = (function, args)
            return function(*args, **(kwargs or {}))

    with Record():
        ops.attention_weights(**tensors, dropout_p=0.25, average_heads=average_heads, impl="triton")
    function, arguments = calls["llmos_fast::attention_weights_triton"]
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(function, plain)


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(average_heads, dtype):
    torch._dynamo.reset()
    tensors, options = make_call((2, 4, 2, 5, 7, 8, 6), {"bias": True, "causal": True}, dtype)
    options |= {"average_heads": average_heads, "impl": "triton"}
    compiled = torch.compile(ops.attention_weights, fullgraph=True, backend="aot_eager")
    eager_out, eager_gradients = outputs_and_gradients(ops.attention_weights, tensors, options)
    out, gradients = outputs_and_gradients(compiled, tensors, options)
    for ours, theirs in zip(out, eager_out, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, eager_gradients[name]), name


@pytest.mark.parametrize("average_heads", [False, True], ids=["heads", "mean"])
def test_gradients_of_gradients_in_triton(average_heads):
    """Differentiating the gradients of the kernels gives what the definition gives."""

    def second(function, tensors, options):
        wanted = [t for t in tensors.values() if t.requires_grad]
        torch.manual_seed(0)
        results = function(**tensors, **options)
        first = torch.autograd.grad(
            sum(r.square().sum() for r in results), wanted, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    features = {"bias": True, "sinks": True, "dropout_p": 0.25}
    tensors, options = make_call((2, 4, 2, 5, 7, 8, 6), features)
    options |= {"average_heads": average_heads}
    wide = {n: t.detach().double().requires_grad_() for n, t in tensors.items()}
    ours = second(ops.attention_weights, tensors, options | {"impl": "triton"})
    eager = second(reference.attention_weights, tensors, options)
    truth = second(reference.attention_weights, wide, options)
    for out, low, true in zip(ours, eager, truth, strict=True):
        # the reduction counts both differentiations, each of up to 100 terms
        assert_close_to_truth(out, low, true, reduction=10_000)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_tensor_in_three_places(impl):
    """Each argument's gradient is its own part: none is counted twice in the sum."""
    x = random(1, 2, 9, 8, requires_grad=True)
    wide = x.detach().double().requires_grad_()

    def gradient(op, x, **options):
        _, weights = op(x, x, x, **options)
        return torch.autograd.grad(weights.square().sum(), x)[0]

    ours = gradient(ops.attention_weights, x, impl=impl)
    eager = gradient(reference.attention_weights, x)
    truth = gradient(reference.attention_weights, wide)
    assert_close_to_truth(ours, eager, truth, reduction=9 * 8)


BAD = [
    ({"query": random(2, 3, 4)}, "query must have 4 dimensions, got \\(2, 3, 4\\)"),
    ({"value": random(1, 2, 8, 8)}, "value must have shape"),
    ({"mask": torch.ones(5, 9)}, "mask must be bool"),
    ({"causal": "upper"}, "causal must be"),
    ({"window": (-2, 0)}, "window must have sides"),
    ({"dropout_p": 1.5}, "dropout_p must be in \\[0, 1\\], got 1.5"),
    ({"sinks": random(3)}, "sinks must have shape"),
    ({"key_lengths": torch.tensor([3.0])}, "key_lengths must be int32 or int64"),
    (
        {n: torch.ones(1, 0, 9, 8) for n in ("query", "key", "value")} | {"average_heads": True},
        "heads of query must be 1 or more for a mean, got 0",
    ),
    ({"impl": "cuda"}, "no such implementation"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = {"query": random(1, 2, 5, 8), "key": random(1, 2, 9, 8), "value": random(1, 2, 9, 8)}
    with pytest.raises(ValueError, match=f"^attention_weights.*{message}"):
        ops.attention_weights(**(call | change))


def test_who_takes_which_call():
    x = random(1, 1, 2, 4)
    assert explain(ops.attention_weights, x, x, x) == [
        ("native", None),
        ("triton", None),
        ("reference", None),
    ]
    wide = random(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="triton needs bfloat16, float16 or float32"):
        ops.attention_weights(wide, wide, wide, impl="triton")
    with pytest.raises(ValueError, match="native needs float32 or bfloat16"):
        ops.attention_weights(x, x, x, bias=wide[:, :, :, :2], impl="native")
