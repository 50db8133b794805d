"""The functions of flash-attn against a plain implementation of what its docstrings say."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast.compat import flash_attn
from llmos_fast.testing import assert_close_to_truth, outputs_and_gradients, random

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {  # of flash-attn 2.8
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert sorted(flash_attn.__all__) == sorted(SIGNATURES)
    signature = inspect.signature(getattr(flash_attn, name))
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[name]})"


def make_dense(batch, heads, heads_k, seq_q, seq_k, dim, dtype):
    grad = {"dtype": dtype, "requires_grad": True}
    return {
        "q": random(batch, seq_q, heads, dim, **grad),
        "k": random(batch, seq_k, heads_k, dim, **grad),
        "v": random(batch, seq_k, heads_k, dim, **grad),
    }


def in_dtype(tensors, dtype):
    return {
        n: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for n, t in tensors.items()
    }


def assert_same_attention(ours, plain, tensors, options):
    """``ours`` and ``plain`` take (**tensors, **options) and return (out, lse)."""
    dtype = tensors["q"].dtype
    seq_q, heads, dim = tensors["q"].shape[-3:]
    seq_k, heads_k, _ = tensors["k"].shape[-3:]
    # a result chains a sum over features (the score) and one over keys or a group's queries; a
    # gradient one more over features (that of the probability)
    reduction = dim * max(seq_k, heads // heads_k * seq_q)
    truth = outputs_and_gradients(plain, in_dtype(tensors, torch.float64), options)
    eager = outputs_and_gradients(plain, in_dtype(tensors, None), options)
    got = outputs_and_gradients(ours, in_dtype(tensors, None), options)
    assert got[0][0].dtype == dtype
    assert got[0][1].dtype == torch.float32
    for index, name in enumerate(("out", "lse")):
        three = (results[0][index] for results in (got, eager, truth))
        assert_close_to_truth(*three, reduction=reduction, dtype=dtype, name=name)
    for name, true in truth[1].items():
        three = got[1][name], eager[1][name], true
        assert_close_to_truth(
            *three, reduction=dim * reduction, dtype=dtype, name=f"gradient of {name}"
        )


def with_lse(function):
    """Drop the third result of ``return_attn_probs``."""

    def call(*args, **kwargs):
        out, lse, probabilities = function(*args, **kwargs, return_attn_probs=True)
        assert probabilities is None
        return out, lse

    return call


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 5)},
    "left": {"window_size": (4, -1)},
    "right": {"window_size": (-1, 2)},
    "narrow": {"window_size": (0, 0)},
    "causal_window": {"causal": True, "window_size": (3, 7)},
    "alibi": {"alibi_slopes": True},
    "causal_alibi": {"causal": True, "alibi_slopes": True},
    "alibi_window": {"alibi_slopes": True, "window_size": (6, 3)},
    "softcap": {"softcap": 1.5, "softmax_scale": 0.5},
}
LENGTH_PAIRS = [(9, 9), (5, 20), (20, 5), (3, 7), (1, 30), (30, 1)]


def fill_slopes(options, *shape):
    if options.get("alibi_slopes") is True:
        return options | {"alibi_slopes": torch.rand(*shape)}
    return options


@pytest.mark.parametrize("lengths", LENGTH_PAIRS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_dense(plain_attention, name, lengths, dtype):
    tensors = make_dense(2, 4, 2, *lengths, 16, dtype)
    options = fill_slopes(OPTIONS[name], 2, 4)
    assert_same_attention(with_lse(flash_attn.flash_attn_func), plain_attention, tensors, options)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.integers(1, 40),
        st.integers(1, 40), st.integers(4, 24),
    ),
    causal=st.booleans(),
    window_size=st.tuples(st.integers(-2, 12), st.integers(-2, 12)),
    softcap=st.sampled_from([0.0, -1.0, 2.0]),
    slopes=st.sampled_from([None, "head", "batch"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_dense_options_combine(plain_attention, sizes, causal, window_size, softcap, slopes, dtype):
    batch, (heads, heads_k), seq_q, seq_k, dim = sizes
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    if slopes is not None:
        options["alibi_slopes"] = torch.rand(*((batch, heads) if slopes == "batch" else (heads,)))
    tensors = make_dense(batch, heads, heads_k, seq_q, seq_k, dim, dtype)
    assert_same_attention(
        with_lse(flash_attn.flash_attn_func),
        plain_attention,
        tensors,
        options,
    )


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (1, 0)}], ids=str)
def test_rows_without_keys_give_zero(options):
    tensors = make_dense(1, 2, 2, 5, 2, 8, torch.float32)
    ours = with_lse(flash_attn.flash_attn_func)
    (out, lse), gradients = outputs_and_gradients(ours, tensors, options)
    assert not out[:, :3].any()
    assert (lse[:, :, :3] == -torch.inf).all()
    assert out[:, 3:].all()
    assert not gradients["q"][:, :3].any()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_causal_is_aligned_to_the_bottom_right():
    # the two masks that flash-attn draws; with equal scores, row i averages its keys' values
    for seq_q, seq_k, rows in [
        (2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]),
    ]:
        mask = torch.tensor(rows, dtype=torch.float32)
        value = torch.eye(seq_k).view(1, seq_k, 1, seq_k)
        zeros = (torch.zeros(1, seq, 1, 8) for seq in (seq_q, seq_k))
        out = flash_attn.flash_attn_func(*zeros, value, causal=True)
        assert torch.equal(out[0, :, 0], mask / mask.sum(1, keepdim=True).clamp(min=1))


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def make_packed(lengths_q, lengths_k, heads, heads_k, dim, dtype):
    tensors = make_dense(1, heads, heads_k, sum(lengths_q), sum(lengths_k), dim, dtype)
    return {n: t.detach()[0].requires_grad_() for n, t in tensors.items()}


def packed_by_sequence(plain_attention, lengths_q, lengths_k):
    """``plain_attention`` of each packed sequence by itself, as one function."""

    def call(q, k, v, alibi_slopes=None, **options):
        outs, lses = [], []
        q, k, v = q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)
        for b, sequence in enumerate(zip(q, k, v, strict=True)):
            slopes = alibi_slopes
            if slopes is not None and slopes.dim() == 2:
                slopes = slopes[b]
            parts = (t.unsqueeze(0) for t in sequence)
            out, lse = plain_attention(*parts, alibi_slopes=slopes, **options)
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1)

    return call


PACKED = {"equal": ([5, 1, 12], [5, 1, 12]), "unequal": ([5, 1, 12, 0, 7], [9, 4, 3, 2, 0])}


@pytest.mark.parametrize("lengths", PACKED)
@pytest.mark.parametrize("name", OPTIONS)
def test_packed(plain_attention, name, lengths, dtype):
    check_packed(plain_attention, *PACKED[lengths], fill_slopes(OPTIONS[name], 4), dtype)


@pytest.mark.parametrize("lengths", PACKED)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_with_slopes_per_sequence(plain_attention, causal, lengths, dtype):
    slopes = torch.rand(len(PACKED[lengths][0]), 4)
    check_packed(
        plain_attention, *PACKED[lengths], {"causal": causal, "alibi_slopes": slopes}, dtype
    )


def check_packed(plain_attention, lengths_q, lengths_k, options, dtype):
    tensors = make_packed(lengths_q, lengths_k, 4, 2, 16, dtype)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)

    def ours(q, k, v, **options):
        call = with_lse(flash_attn.flash_attn_varlen_func)
        return call(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), **options)

    plain = packed_by_sequence(plain_attention, lengths_q, lengths_k)
    assert_same_attention(ours, plain, tensors, options)


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (3, 1)}], ids=str)
def test_packed_rows_of_no_sequence_give_zero(options):
    tensors = make_packed([3, 5], [4, 6], 2, 2, 8, torch.float32)
    cu_q, cu_k = (torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 6], [0, 4, 10]))
    call = with_lse(flash_attn.flash_attn_varlen_func)
    out, lse = call(**tensors, **vars_of(cu_q, cu_k, 3, 6), **options)
    assert out.shape == (8, 2, 8)
    assert out[5].any()
    assert not out[6:].any()
    assert (lse[:, 6:] == -torch.inf).all()


def vars_of(cu_q, cu_k, max_q, max_k):
    return dict(zip(LENGTHS.split(", "), (cu_q, cu_k, max_q, max_k), strict=True))


def scatter_to_pages(rows, page_size, table, pages):
    """Pages of [rows ...] by sequence; what no token fills is NaN."""
    cache = torch.full((pages, page_size, *rows[0].shape[1:]), torch.nan, dtype=rows[0].dtype)
    for b, sequence in enumerate(rows):
        for t, row in enumerate(sequence):
            cache[table[b, t // page_size], t % page_size] = row
    return cache


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (7, 2)}], ids=str)
def test_packed_with_block_table_equals_packed(options):
    lengths_q, lengths_k = [3, 1, 6], [21, 0, 8]
    tensors = make_packed(lengths_q, lengths_k, 4, 2, 8, torch.float32)
    lengths = vars_of(cumulative(lengths_q), cumulative(lengths_k), 6, 21)
    table = torch.tensor([[5, 0, 2], [-1, 99, -7], [3, -1, 50]], dtype=torch.int32)
    pages = {
        n: scatter_to_pages(tensors[n].detach().split(lengths_k), 8, table, 6).requires_grad_()
        for n in ("k", "v")
    }
    call = with_lse(flash_attn.flash_attn_varlen_func)
    expected = outputs_and_gradients(call, tensors, lengths | options)
    paged = outputs_and_gradients(call, tensors | pages, lengths | options | {"block_table": table})
    for ours, theirs in zip(paged[0], expected[0], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(paged[1]["q"], expected[1]["q"])
    for name in ("k", "v"):
        by_sequence = expected[1][name].split(lengths_k)
        wanted = scatter_to_pages(by_sequence, 8, table, 6).nan_to_num(0.0)
        assert torch.equal(paged[1][name], wanted)


def test_stacked_tensors_are_views_of_the_same_attention():
    options = {"causal": True, "window_size": (4, -1)}
    qkv = random(2, 9, 3, 4, 8, requires_grad=True)
    q, k, v = qkv.unbind(2)
    out = flash_attn.flash_attn_func(q, k, v, **options)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, **options), out)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options), out)
    ours = flash_attn.flash_attn_qkvpacked_func(qkv, **options)
    direction = random(*out.shape)
    assert torch.equal(
        *(torch.autograd.grad(o, qkv, direction, retain_graph=True)[0] for o in (ours, out))
    )

    cu = cumulative([9, 9])
    rows = qkv.flatten(0, 1)
    flat = flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu, 9, **options)
    assert torch.equal(flat.view_as(out), out)
    pair = rows[:, 0], rows[:, 1:]
    flat = flash_attn.flash_attn_varlen_kvpacked_func(*pair, cu, cu, 9, 9, **options)
    assert torch.equal(flat.view_as(out), out)


@pytest.mark.parametrize("options", [{}, {"window_size": (20, 3)}], ids=str)
def test_dropout_keeps_the_expectation(options):
    ones = torch.ones(400, 1, 8)
    lengths = vars_of(cumulative([150, 250]), cumulative([250, 150]), 250, 250)
    for out in (
        flash_attn.flash_attn_func(ones[None], ones[None], ones[None], 0.25, **options)[0],
        flash_attn.flash_attn_varlen_func(ones, ones, ones, **lengths, dropout_p=0.25, **options),
    ):
        rows = out[out[:, 0, 0] != 0, 0, 0]
        assert rows.std() > 0
        # more than 250 rows of 20 Bernoulli draws, each 4/3 or 0, with a deviation of 0.58
        assert abs(rows.mean().item() - 1.0) < 5 * 0.58 / (250 * 20) ** 0.5


X, CU = random(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
BAD = [
    ("flash_attn_func", (X, X, X), {}, "flash_attn_func: q must have 4 dimensions"),
    ("flash_attn_func", (X[None],) * 3, {"dropout_p": 2.0}, "attention: dropout_p must be in"),
    ("flash_attn_qkvpacked_func", (X[None],), {}, "qkv must have shape"),
    ("flash_attn_kvpacked_func", (X[None], random(1, 6, 3, 2, 8)), {}, "kv must have shape"),
    ("flash_attn_varlen_qkvpacked_func", (X, CU, 4), {}, "qkv must have shape"),
    ("flash_attn_varlen_kvpacked_func", (X, X, CU, CU, 4, 4), {}, "kv must have shape"),
    ("flash_attn_varlen_func", (X[0], X, X, CU, CU, 4, 4), {}, "q must have 3 dimensions"),
    ("flash_attn_varlen_func", (X, X, X[:5], CU, CU, 4, 4), {}, "v must have shape"),
    ("flash_attn_varlen_func", (X, X, X, CU, CU[:2], 4, 4), {}, "cu_seqlens_k must have shape"),
    (
        "flash_attn_varlen_func",
        (X, X, X, CU, CU + 1, 4, 4),
        {"window_size": (1, 1)},
        r"cu_seqlens_k must rise from 0 to at most 6, got \[1, 3, 7\]",
    ),
    (
        "flash_attn_varlen_func",
        (X, X, X, CU, CU, 4, 4),
        {"alibi_slopes": torch.ones(3, 2)},
        "alibi_slopes must have shape",
    ),
    (
        "flash_attn_varlen_func",
        (X, X[None], X[None], CU, CU, 4, 4),
        {"block_table": CU},
        "block_table must have shape",
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"), BAD, ids=[f"{n}-{m}" for n, _, _, m in BAD]
)
def test_bad_input(name, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(flash_attn, name)(*arguments, **options)
