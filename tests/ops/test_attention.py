"""Attention against its definition, feature by feature and in pairs, and what must never happen."""

import ctypes
import itertools
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import explain, ops, reference
from llmos_fast.testing import assert_within_budget, outputs_and_gradients, random

IMPLEMENTATIONS = ["native", "triton"]
SHAPES = [  # batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v
    ("native", (1, 1, 1, 1, 1, 1, 1)),
    ("native", (2, 8, 2, 63, 63, 16, 16)),
    ("native", (1, 4, 4, 7, 253, 20, 36)),
    ("native", (2, 2, 1, 100, 300, 64, 64)),
    ("native", (1, 2, 2, 5, 3, 8, 8)),
    # interpreted, with tiles of 32 x 32
    ("triton", (1, 1, 1, 1, 1, 1, 1)),
    ("triton", (2, 4, 2, 63, 33, 16, 16)),
    ("triton", (1, 2, 2, 7, 70, 20, 36)),
    ("triton", (1, 2, 1, 40, 50, 64, 64)),
    ("triton", (1, 2, 2, 5, 3, 8, 8)),
]

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "bottom_right": {"causal": "bottom_right"},
    "window": {"window": (5, 2)},
    "mask": {"mask": True},
    "bias": {"bias": True},
    "row_bias": {"bias": "row"},
    "alibi": {"alibi_slopes": True},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.3},
    "lengths": {"key_lengths": True},
    "scale": {"scale": 0.7},
}


def make_call(shape, features, dtype, requires_grad=True):
    """(tensors, options) for ops.attention; True stands for a tensor that fits the shape."""
    batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v = shape
    grad = {"dtype": dtype, "requires_grad": requires_grad}
    tensors = {
        "query": random(batch, heads_q, seq_q, head_dim, **grad),
        "key": random(batch, heads_kv, seq_k, head_dim, **grad),
        "value": random(batch, heads_kv, seq_k, head_dim_v, **grad),
    }
    options = {"return_lse": True}
    for name, value in features.items():
        if name == "mask":
            tensors["mask"] = torch.rand(batch, 1, seq_q, seq_k) > 0.4
        elif name == "bias":
            sizes = (seq_k,) if value == "row" else (1, heads_q, seq_q, seq_k)
            tensors["bias"] = random(*sizes, **grad)
        elif name == "sinks":
            tensors["sinks"] = random(heads_q, **grad)
        elif name == "alibi_slopes":
            tensors["alibi_slopes"] = torch.rand(heads_q)
        elif name == "key_lengths":
            tensors["key_lengths"] = torch.arange(batch) * (seq_k // 2)
        else:
            options[name] = value
    return tensors, options


def check(shape, features, dtype, impl):
    tensors, options = make_call(shape, features, dtype)
    batch, heads_q, heads_kv, seq_q, seq_k, head_dim, head_dim_v = shape
    # a gradient chains two sums, over a head's features and then over keys or a group's queries;
    # that of a broadcast bias runs over everything
    reduction = max(head_dim, head_dim_v) * max(seq_k, heads_q // heads_kv * seq_q)
    if "bias" in features:
        reduction = max(reduction, batch * heads_q * seq_q * seq_k)
    if "sinks" in features:  # over keys, features and all rows of a head
        reduction = max(reduction, seq_k * head_dim_v * batch * seq_q)
    assert_within_budget(
        ops.attention, reference.attention, tensors, options, impl=impl, reduction=reduction
    )


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("impl", "shape"), SHAPES, ids=str)
def test_each_feature(impl, shape, feature, dtype):
    check(shape, FEATURES[feature], dtype, impl)


@pytest.mark.parametrize(
    "feature", ["dropout", "softcap", "row_bias", "causal", "bottom_right", "window"]
)
def test_every_instruction_set(cpu_set, feature, dtype):
    check((2, 4, 2, 50, 270, 40, 24), FEATURES[feature], dtype, "native")


@pytest.mark.parametrize("seq", [1, 11, 12, 13, 97, 130, 277])
@pytest.mark.parametrize("window", [(-1, -1), (40, 7)])
def test_every_border_of_a_tile(cpu_set, window, seq, dtype):
    """Strips of 12 queries, panels of 16 or 32 keys, blocks of 48, 264 and 256: each cut short."""
    features = {"causal": window == (-1, -1), "window": window, "dropout_p": 0.2}
    check((1, 2, 1, seq, seq, 16, 20), features, dtype, "native")


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window": (40, 7)}, {"softcap": 2.0}, {"dropout_p": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("seq_q", [37, 133])
def test_what_an_earlier_call_left_is_never_read(seq_q, options, dtype):
    tensors, _ = make_call((2, 4, 2, seq_q, 131, 20, 24), {}, dtype)
    options = {"return_lse": True, "impl": "native", **options}
    torch.manual_seed(3)
    before = outputs_and_gradients(ops.attention, tensors, options)
    # its scratch memory is larger, and there are heads for every thread
    nan = [torch.full((8, 8, 600, 64), torch.nan, dtype=dtype, requires_grad=True)] * 3
    ops.attention(*nan, softcap=2.0, impl="native").sum().backward()  # fills the stack as well
    torch.manual_seed(3)
    after = outputs_and_gradients(ops.attention, tensors, options)
    for old, new in zip(before[0], after[0], strict=True):
        assert torch.equal(old, new)
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


@pytest.fixture(scope="module")
def fill_stack(tmp_path_factory):
    """A function that leaves NaN in a megabyte of the stack below its caller."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("stack")
    source, library = folder / "fill.c", folder / "fill.so"
    source.write_text(
        "void fill(void) { volatile float x[1 << 18];"
        ' for (int i = 0; i < 1 << 18; ++i) x[i] = __builtin_nanf(""); }'
    )
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library)).fill


@pytest.mark.parametrize("feature", ["dropout", "softcap", "causal", "window"])
@pytest.mark.parametrize("seq_q", [1, 13, 38])
def test_what_lies_on_the_stack_is_never_read(fill_stack, cpu_set, feature, seq_q, dtype):
    tensors, options = make_call((1, 4, 2, seq_q, 40, 20, 24), FEATURES[feature], dtype)
    fill_stack()
    out, lse = ops.attention(**tensors, **options, impl="native")
    loss = out.sum() + lse.sum()
    fill_stack()
    loss.backward()
    assert out.isfinite().all()
    assert all(tensors[name].grad.isfinite().all() for name in ("query", "key", "value"))


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scale_without_a_sign_of_its_own(scale, dtype):
    check((1, 2, 2, 30, 40, 16, 16), {"causal": True, "scale": scale}, dtype, "native")


def shapes(longest_q, longest_k):
    sizes = st.integers(1, 40)
    heads_kv, batch = st.sampled_from([1, 2, 4]), st.integers(1, 2)
    # the gradients of a single key and of its query are 0: no scale to measure their rounding by
    lengths = (st.integers(1, longest_q), st.integers(2, longest_k))
    return st.tuples(batch, st.just(4), heads_kv, *lengths, sizes, sizes)


names = st.sets(st.sampled_from(sorted(FEATURES)), max_size=5)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def combine(names):
    return {k: v for name in sorted(names) for k, v in FEATURES[name].items()}


@settings(max_examples=40, deadline=None)
@given(shape=shapes(70, 300), names=names, dtype=dtypes)
def test_features_combine(shape, names, dtype):
    check(shape, combine(names), dtype, "native")


@settings(max_examples=20, deadline=None)
@given(shape=shapes(70, 70), names=names, dtype=dtypes)
def test_features_combine_in_triton(shape, names, dtype):
    check(shape, combine(names), dtype, "triton")


@pytest.mark.parametrize("pair", list(itertools.combinations(sorted(FEATURES), 2)), ids="-".join)
def test_pairs_of_features_in_triton(pair):
    check((1, 2, 1, 37, 45, 16, 16), combine(pair), torch.float32, "triton")


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_one_key(impl):
    query, key, value = (random(2, 3, n, 20, requires_grad=True) for n in (5, 1, 1))
    out = ops.attention(query, key, value, impl=impl)
    out.backward(d_out := random(2, 3, 5, 20))
    torch.testing.assert_close(out, value.expand_as(out))
    torch.testing.assert_close(value.grad, d_out.sum(2, keepdim=True))
    # of d_out v - d_out out, times a key or five queries, only rounding is left
    eps, terms = torch.finfo(torch.float32).eps, (d_out.abs() @ value.abs().mT).max()
    for gradient, other, count in ((query.grad, key, 1), (key.grad, query, 5)):
        assert gradient.abs().max() < eps * count * terms * other.abs().max()


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_sdpa(impl, causal):
    query, key, value = (random(2, 3, 65, 32) for _ in range(3))
    ours = ops.attention(query, key, value, causal=causal, impl=impl)
    torch.testing.assert_close(
        ours, F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    )


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_rows_without_a_key_give_zero_and_no_gradient(impl, dtype):
    tensors, _ = make_call((2, 2, 2, 6, 9, 8, 8), {"sinks": True}, dtype)
    mask = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False
    options = {"mask": mask, "dropout_p": 0.5, "return_lse": True, "impl": impl}
    out, lse = ops.attention(**tensors, **options)
    assert not out[0, :, 2].any()
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    _, gradients = outputs_and_gradients(ops.attention, tensors, options)
    for name in ("query", "key", "value"):
        assert torch.isfinite(gradients[name]).all()
        assert not gradients[name][1].any()
    assert not gradients["query"][0, :, 2].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_later_keys_do_not_reach_earlier_rows(impl):
    query, key, value = (random(1, 2, 70, 16) for _ in range(3))
    before = ops.attention(query, key, value, causal=True, impl=impl)
    key[:, :, 40:], value[:, :, 40:] = 1e4, -1e4
    after = ops.attention(query, key, value, causal=True, impl=impl)
    assert torch.equal(after[:, :, :40], before[:, :, :40])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides(impl):
    packed = random(2, 50, 3, 4, 16)  # batch, seq, (q, k, v), heads, head_dim
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    odd = random(2, 4, 16, 50).transpose(2, 3)  # head_dim is not the fastest dimension
    mask = torch.rand(50, 2).gt(0.5).t()[:, None, None, :]
    for q in (query, odd):
        ours = ops.attention(q, key, value, mask=mask, impl=impl)
        dense = (t.contiguous() for t in (q, key, value))
        assert torch.equal(ours, ops.attention(*dense, mask=mask.contiguous(), impl=impl))


@pytest.mark.parametrize(("seq_q", "seq_k"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_empty(impl, seq_q, seq_k):
    tensors, options = make_call((2, 2, 1, seq_q, seq_k, 8, 4), {}, torch.float32)
    (out, lse), gradients = outputs_and_gradients(ops.attention, tensors, options | {"impl": impl})
    assert out.shape == (2, 2, seq_q, 4)
    assert not out.any()
    assert lse.shape == (2, 2, seq_q)
    assert all(not g.any() for g in gradients.values())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
def test_packed_sequences_equal_separate_ones(impl, causal, dtype):
    lengths_q, lengths_k = [5, 1, 0, 60], [9, 1, 3, 60]
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    )
    tensors = {
        "query": random(66, 4, 16, dtype=dtype, requires_grad=True),
        "key": random(73, 2, 16, dtype=dtype, requires_grad=True),
        "value": random(73, 2, 24, dtype=dtype, requires_grad=True),
    }
    options = {"cu_seqlens": (cu_q, cu_k, 60, 60), "causal": causal, "window": (20, -1)}
    (ours,), gradients = outputs_and_gradients(ops.attention, tensors, options | {"impl": impl})
    assert ours.shape == (66, 4, 24)
    parts = []
    for b in range(4):
        q = tensors["query"][cu_q[b] : cu_q[b + 1]].transpose(0, 1).unsqueeze(0)
        k, v = (
            tensors[n][cu_k[b] : cu_k[b + 1]].transpose(0, 1).unsqueeze(0) for n in ("key", "value")
        )
        part = ops.attention(q, k, v, causal=causal, window=(20, -1), impl=impl)
        parts.append(part.squeeze(0).transpose(0, 1))
    assert torch.equal(ours, torch.cat(parts))
    assert_within_budget(
        ops.attention,
        reference.attention,
        tensors,
        options | {"dropout_p": 0.2, "return_lse": True},
        impl=impl,
        reduction=66,
    )
    assert gradients["key"].isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropout_keeps_the_expectation(impl):
    ones = torch.ones(1, 1, 400, 64)
    out = ops.attention(ones, ones, ones, dropout_p=0.25, impl=impl)
    # mean of 400 x 400 Bernoulli draws, each 4/3 or 0: its deviation is 0.0015
    assert abs(out.mean().item() - 1.0) < 5 * 0.0015
    assert not ops.attention(ones, ones, ones, dropout_p=1.0, impl=impl).any()


BAD = [
    ({"query": random(2, 3, 4)}, "query must have 4 dimensions, got \\(2, 3, 4\\)"),
    ({"key": random(1, 2, 9, 9)}, "key must have shape"),
    ({"value": random(1, 2, 8, 8)}, "value must have shape"),
    ({"value": random(1, 2, 9, 8, dtype=torch.bfloat16)}, "value must have the dtype of query"),
    ({"query": random(1, 3, 5, 8)}, "heads of query must be a multiple"),
    ({"query": torch.ones(1, 2, 5, 8, dtype=torch.int64)}, "query must be floating point"),
    ({"mask": torch.ones(5, 9)}, "mask must be bool"),
    ({"mask": torch.ones(5, 8, dtype=torch.bool)}, "mask must broadcast"),
    ({"bias": random(2, 2, 5, 9)}, "bias must broadcast"),
    ({"causal": "upper"}, "causal must be"),
    ({"window": (-2, 0)}, "window must have sides"),
    ({"dropout_p": 1.5}, "dropout_p must be in \\[0, 1\\], got 1.5"),
    ({"softcap": -1.0}, "softcap must be at least 0"),
    ({"sinks": random(3)}, "sinks must have shape"),
    ({"alibi_slopes": random(3)}, "alibi_slopes must have shape"),
    ({"key_lengths": torch.tensor([3.0])}, "key_lengths must be int32 or int64"),
    ({"key_lengths": torch.tensor([3, 4])}, "key_lengths must have shape"),
    ({"impl": "cuda"}, "no such implementation"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = {
        "query": random(1, 2, 5, 8),
        "key": random(1, 2, 9, 8),
        "value": random(1, 2, 9, 8),
    }
    with pytest.raises(ValueError, match=f"attention.*{message}"):
        ops.attention(**(call | change))


@pytest.mark.parametrize("cu", [[0, 3, 9], [1, 4, 5], [0, 4, 3], [0, 6]])
def test_bad_packed_lengths_never_reach_memory(cu):
    x = random(5, 2, 8)
    lengths = torch.tensor(cu, dtype=torch.int32)
    good = torch.tensor([0] * (len(cu) - 1) + [5], dtype=torch.int32)
    with pytest.raises(ValueError, match="attention: cu_seqlens_q must rise from 0 to at most 5"):
        ops.attention(x, x, x, cu_seqlens=(lengths, good, 5, 5), impl="native")


def test_forced_implementation_says_why_not():
    x = random(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="native needs float32 or bfloat16"):
        ops.attention(x, x, x, impl="native")
    with pytest.raises(ValueError, match="triton needs bfloat16, float16 or float32"):
        ops.attention(x, x, x, impl="triton")
    wide = random(1, 1, 2, 260)
    with pytest.raises(ValueError, match=r"triton needs head_dim of at most 256 .*, got 260"):
        ops.attention(wide, wide, wide, impl="triton")
    assert explain(ops.attention, x, x, x)[-1] == ("reference", None)
