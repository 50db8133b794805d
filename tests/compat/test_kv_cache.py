"""A step of generation with flash-attn's cache against a plain one, token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import ops, use
from llmos_fast.compat import flash_attn
from llmos_fast.testing import assert_close_to_truth, random


def turn(x, cos, sin, interleaved):
    """Rotate the first features of [batch seq heads dim] by angles [batch seq pairs]."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = turned.unflatten(-1, (pairs, 2) if interleaved else (2, pairs)).unbind(
        -1 if interleaved else -2
    )
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = a * cos - b * sin, a * sin + b * cos
    return torch.cat((torch.stack((a, b), -1 if interleaved else -2).flatten(-2), rest), -1)


def plain_step(
    plain_attention, q, k_cache, v_cache, past, k=None, v=None, cos=None, sin=None,
    interleaved=True, **options,
):  # fmt: skip
    """(out, lse, k_cache, v_cache) for caches of [batch capacity heads dim], new ones."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    new = 0 if k is None else k.shape[1]
    if cos is not None:
        local = options.get("causal") or max(options.get("window_size", (-1, -1))) >= 0
        rows_q = torch.arange(q.shape[1]) if local else torch.zeros(q.shape[1], dtype=torch.long)
        at_q, at_k = past[:, None] + rows_q, past[:, None] + torch.arange(new)
        q = turn(q, cos[at_q], sin[at_q], interleaved)
        k = turn(k, cos[at_k], sin[at_k], interleaved)
    for b, start in enumerate(past.tolist()):
        for t in range(new):
            k_cache[b, start + t], v_cache[b, start + t] = k[b, t], v[b, t]
    out, lse = plain_attention(q, k_cache, v_cache, lengths=past + new, **options)
    return out, lse, k_cache, v_cache


class Layout:
    """How a cache of [batch capacity heads dim] lies in memory, and how it is found again."""

    def __init__(self, kind, batch, capacity):
        self.arguments = {}
        self.capacity = self.page_size = capacity
        rows = torch.randperm(batch + 2)[:batch] if kind == "indexed" else torch.arange(batch)
        self.table, self.pages = rows[:, None], batch + (0 if kind == "dense" else 2)
        if kind == "indexed":
            self.arguments["cache_batch_idx"] = rows.int()
        if kind.startswith("pages of"):
            self.page_size = int(kind.split()[-1])
            count = batch * capacity // self.page_size
            self.pages = count + 3
            self.table = torch.randperm(self.pages)[:count].view(batch, -1)
            self.arguments["block_table"] = self.table.int()

    def lay(self, cache):
        shape = (self.pages, self.page_size, *cache.shape[2:])
        memory = torch.full(shape, torch.nan, dtype=cache.dtype)
        memory[self.table] = cache.view(*self.table.shape, self.page_size, *cache.shape[2:])
        return memory

    def read(self, memory):
        return memory[self.table].flatten(1, 2)


LAYOUTS = ["dense", "too many rows", "indexed", "pages of 16", "pages of 8"]


def make_step(batch, heads, heads_k, seq_q, new, capacity, past, dtype, leftpad=None):
    """Tensors of one step; the caches are NaN wherever no token is."""
    dim = 16
    tensors = {"q": random(batch, seq_q, heads, dim, dtype=dtype)}
    for name in ("k_cache", "v_cache"):
        rows = torch.arange(capacity)
        missing = rows >= past[:, None]
        if leftpad is not None:
            missing |= rows < leftpad[:, None]
        cache = random(batch, capacity, heads_k, dim, dtype=dtype)
        tensors[name] = cache.masked_fill(missing[:, :, None, None], torch.nan)
    if new:
        tensors |= {n: random(batch, new, heads_k, dim, dtype=dtype) for n in ("k", "v")}
    return tensors


def add_rotary(tensors, capacity, pairs, dtype):
    angles = torch.rand(capacity, pairs) * 2 * math.pi
    return tensors | {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def check_step(plain_attention, tensors, past, layout, options, leftpad=None, interleaved=True):
    dtype, new = tensors["q"].dtype, "k" in tensors
    plain_options = options | {"starts": leftpad, "interleaved": interleaved, "past": past}
    in_double = {n: t.double() for n, t in tensors.items()}
    truth = plain_step(plain_attention, **in_double, **plain_options)
    eager = plain_step(plain_attention, **tensors, **plain_options)
    memory = {n: layout.lay(tensors[n]) for n in ("k_cache", "v_cache")}
    call = tensors | memory
    if "cos" in call:
        call["rotary_cos"], call["rotary_sin"] = call.pop("cos"), call.pop("sin")
        call["rotary_interleaved"] = interleaved
    if leftpad is not None:
        call["cache_leftpad"] = leftpad.int()
    call |= {"cache_seqlens": past.int()} | layout.arguments | options
    if "block_table" in call:  # numbers of pages that are not used yet may be anything
        page_starts = torch.arange(layout.table.shape[1]) * layout.page_size
        unused = page_starts >= (past + (tensors["k"].shape[1] if new else 0))[:, None]
        call["block_table"] = call["block_table"].masked_fill(unused, 999)
    before = {n: layout.lay(cache) for n, cache in zip(memory, eager[2:], strict=True)}
    budget = {"reduction": 16 * layout.capacity, "dtype": dtype}

    out = flash_attn.flash_attn_with_kvcache(**call)
    assert out.dtype == dtype
    assert_close_to_truth(out, eager[0], truth[0], **budget)
    assert torch.equal(memory["v_cache"].nan_to_num(), before["v_cache"].nan_to_num())
    key = memory["k_cache"]
    assert torch.equal(key.isnan(), before["k_cache"].isnan())
    three = (layout.read(key), eager[2], truth[2])
    assert_close_to_truth(*(t.nan_to_num(0.0) for t in three), reduction=2, dtype=dtype)
    if new and "cos" not in tensors:
        assert torch.equal(key.nan_to_num(), before["k_cache"].nan_to_num())

    # writing the same tokens once more changes nothing, and the log-sum-exp comes with it
    out, lse = flash_attn.flash_attn_with_kvcache(**call, return_softmax_lse=True)
    assert_close_to_truth(out, eager[0], truth[0], **budget)
    assert_close_to_truth(lse, eager[1], truth[1], **budget, name="lse")


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal_window": {"causal": True, "window_size": (6, -1)},
    "window": {"window_size": (5, 2)},
    "left": {"window_size": (5, -1)},
    "alibi": {},
    "causal_alibi_softcap": {"causal": True, "softcap": 2.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("seq_q", "new"), [(1, 1), (3, 3), (5, 0), (4, 2)])
def test_step(plain_attention, name, layout, seq_q, new):
    past = torch.tensor([0, 13, 28])
    tensors = make_step(3, 4, 2, seq_q, new, 32, past, torch.float32)
    if new:
        tensors = add_rotary(tensors, 40, 4, torch.float32)
    options = dict(OPTIONS[name])
    if "alibi" in name:
        options["alibi_slopes"] = torch.rand(3, 4)
    with use("reference"):
        check_step(plain_attention, tensors, past, Layout(layout, 3, 32), options)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 22), min_size=1, max_size=3),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    seq_q=st.integers(1, 5),
    new=st.integers(0, 5),
    layout=st.sampled_from(LAYOUTS),
    pairs=st.sampled_from([None, 3, 8]),
    interleaved=st.booleans(),
    leftpad=st.booleans(),
    causal=st.booleans(),
    window_size=st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
    softcap=st.sampled_from([0.0, 2.0]),
    slopes=st.sampled_from([None, "head", "batch"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_step_options_combine(
    plain_attention, lengths, heads, seq_q, new, layout, pairs, interleaved, leftpad, causal,
    window_size, softcap, slopes, dtype,
):  # fmt: skip
    batch, past = len(lengths), torch.tensor(lengths)
    starts = (past * torch.rand(batch)).long() if leftpad else None
    tensors = make_step(batch, *heads, seq_q, new, 32, past, dtype, starts)
    if new and pairs is not None:
        tensors = add_rotary(tensors, 32, pairs, dtype)
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    if slopes is not None:
        options["alibi_slopes"] = torch.rand(*([batch] if slopes == "batch" else []), heads[0])
    with use("reference"):
        check_step(
            plain_attention, tensors, past, Layout(layout, batch, 32), options, starts, interleaved
        )


@pytest.mark.parametrize("leftpad", [None, torch.tensor([1, 5])], ids=str)
def test_step_on_the_implementations_of_this_machine(plain_attention, leftpad, dtype):
    past = torch.tensor([3, 17])
    tensors = make_step(2, 4, 2, 2, 2, 32, past, dtype, leftpad)
    tensors = add_rotary(tensors, 32, 4, dtype)
    layout = Layout("pages of 16", 2, 32)
    check_step(plain_attention, tensors, past, layout, {"causal": True}, leftpad)


def test_lengths_may_be_one_number_or_the_capacity():
    q, cache = random(2, 1, 2, 8), random(2, 2, 16, 2, 8)
    for number, length in ((7, 7), (None, 16)):
        lengths = torch.full((2,), length, dtype=torch.int32)
        ours = flash_attn.flash_attn_with_kvcache(q, *cache, cache_seqlens=number)
        assert torch.equal(
            ours, flash_attn.flash_attn_with_kvcache(q, *cache, cache_seqlens=lengths)
        )


def test_step_has_no_gradient():
    step = make_step(2, 4, 2, 1, 1, 16, torch.tensor([3, 4]), torch.float32)
    step = {n: t.requires_grad_() for n, t in step.items()}
    assert not flash_attn.flash_attn_with_kvcache(**step, cache_seqlens=3).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seq_q", "causal"), [(2, True), (1, False)])
def test_causal_step_never_waits_for_the_device(monkeypatch, layout, seq_q, causal):
    monkeypatch.delattr(ops, "attention")  # attention_decode is what serves these
    past = torch.tensor([3, 17])
    tensors = make_step(2, 4, 2, seq_q, 2, 32, past, torch.float32)
    tensors = add_rotary(tensors, 32, 4, torch.float32)
    memory = {n: Layout(layout, 2, 32).lay(tensors[n]) for n in ("k_cache", "v_cache")}
    call = tensors | memory | Layout(layout, 2, 32).arguments | {"cache_seqlens": past.int()}
    call["rotary_cos"], call["rotary_sin"] = call.pop("cos"), call.pop("sin")
    # meta tensors have no values: reading one raises
    call = {n: t.to("meta") for n, t in call.items()}
    with use("reference"):
        out = flash_attn.flash_attn_with_kvcache(**call, causal=causal)
    assert out.shape == (2, seq_q, 4, 16)


BAD_STEPS = [
    ({"q": random(2, 2, 3, 8)}, "heads of q must be a multiple of the cache's heads, got 3 and 2"),
    ({"q": random(2, 4, 8)}, r"q must have 4 dimensions, got \(2, 4, 8\)"),
    ({"v_cache": random(2, 16, 2, 8).half()}, "v_cache must have the dtype of q"),
    ({"v_cache": random(2, 15, 2, 8)}, "v_cache must have shape"),
    ({"k": random(2, 3, 1, 8)}, "k must have shape"),
    ({"v": None}, "v must be given where k is"),
    ({"k": None, "v": None}, "k must be given with rotary_cos, got None"),
    ({"rotary_sin": None}, "rotary_sin must be given where rotary_cos is"),
    ({"rotary_cos": random(15, 2), "rotary_sin": random(15, 2)}, "rotary_cos must have a row for"),
    ({"cache_seqlens": 14}, r"cache_seqlens must be in \[0, 16 - 3\].*got \[14\]"),
    ({"cache_seqlens": torch.tensor([-1, 0])}, r"cache_seqlens must be in .* got \[-1, 0\]"),
    ({"cache_seqlens": None}, "cache_seqlens must be in"),
    ({"cache_seqlens": torch.tensor([0.0, 1.0])}, "cache_seqlens must be int32 or int64"),
    ({"cache_batch_idx": torch.tensor([0])}, "cache_batch_idx must have shape"),
    ({"cache_leftpad": torch.tensor([0.0, 1.0])}, "cache_leftpad must be int32 or int64"),
    ({"block_table": torch.tensor([0, 1])}, "block_table must have shape"),
    (
        {"block_table": torch.tensor([[0], [1]]), "cache_batch_idx": torch.tensor([0, 1])},
        "cache_batch_idx must be None with block_table",
    ),
    ({"q": random(3, 1, 4, 8)}, "k_cache must have at least q's 3 rows"),
    ({"alibi_slopes": random(3)}, "alibi_slopes must have shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD_STEPS, ids=[m for _, m in BAD_STEPS])
def test_bad_step_leaves_the_cache_alone(change, message):
    call = {
        "q": random(2, 1, 4, 8),
        "k_cache": torch.zeros(2, 16, 2, 8),
        "v_cache": torch.zeros(2, 16, 2, 8),
        "k": random(2, 3, 2, 8),
        "v": random(2, 3, 2, 8),
        "rotary_cos": random(16, 2),
        "rotary_sin": random(16, 2),
        "cache_seqlens": torch.tensor([4, 5]),
    }
    with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {message}"):
        flash_attn.flash_attn_with_kvcache(**(call | change))
    assert not call["k_cache"].any()
    assert not call["v_cache"].any()
