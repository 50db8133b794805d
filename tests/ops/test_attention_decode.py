"""Attention to a cache: features and pairs, pages, quantized caches, and what must not be read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast import explain, ops, reference
from llmos_fast.testing import assert_within_budget, random

KERNELS = ["native", "triton"]
IMPLEMENTATIONS = [*KERNELS, "reference"]
FP8 = torch.float8_e4m3fn

SHAPES = [  # batch, heads_q, heads_kv, seq_q, capacity, head_dim, head_dim_v
    (1, 1, 1, 1, 1, 1, 1),
    (3, 8, 2, 1, 144, 16, 16),
    (2, 4, 4, 5, 97, 20, 36),
    (2, 40, 2, 2, 64, 64, 32),
    (2, 3, 1, 3, 200, 7, 65),
]

FEATURES = {
    "plain": {},
    "window": {"window": (20, 0)},
    "window_of_one": {"window": (0, -1)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": "heads"},
    "alibi_of_batch": {"alibi_slopes": "batch heads"},
    "scale": {"scale": -0.7},
    "int8": {"quantized": torch.int8},
    "fp8": {"quantized": FP8},
    "fp8_scaled": {"quantized": FP8, "scaled": "heads rows"},
    "int8_by_head": {"quantized": torch.int8, "scaled": "heads"},
    "int8_by_tensor": {"quantized": torch.int8, "scaled": ""},
}


def quantized(x, dtype, scaled):
    """(``x`` in ``dtype``, the scale that undoes it)."""
    dims = {"heads rows": (3,), "heads": (0, 2, 3), "": (0, 1, 2, 3)}[scaled]
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-6) / largest
    y = x / scale
    return (y.round() if dtype == torch.int8 else y).to(dtype), scale.squeeze(-1)


def make_call(shape, features, dtype, lengths=None):
    """(tensors, options) for ops.attention_decode; a quantized cache has no other dtype."""
    batch, heads_q, heads_kv, seq_q, capacity, head_dim, head_dim_v = shape
    features = dict(features)
    tensors = {"query": random(batch, heads_q, seq_q, head_dim, dtype=dtype)}
    options = {}
    caches = {
        "key": random(batch, heads_kv, capacity, head_dim),
        "value": random(batch, heads_kv, capacity, head_dim_v),
    }
    storage = features.pop("quantized", None)
    scaled = features.pop("scaled", "heads rows" if storage == torch.int8 else None)
    for name, x in caches.items():
        if storage is None:
            tensors[f"{name}_cache"] = x.to(dtype)
        elif scaled is None:
            options[f"{name}_cache"] = x.to(storage)
        else:
            options[f"{name}_cache"], tensors[f"{name}_scale"] = quantized(x, storage, scaled)
    for name, value in features.items():
        if name == "sinks":
            tensors["sinks"] = random(heads_q, dtype=dtype)
        elif name == "alibi_slopes":
            sizes = (heads_q,) if value == "heads" else (batch, heads_q)
            tensors["alibi_slopes"] = torch.rand(sizes)
        else:
            options[name] = value
    if lengths is None:
        # the whole cache, nothing, and what is between
        lengths = [(capacity, 0, capacity // 2 + 1)[b % 3] for b in range(batch)]
    options["cache_lengths"] = torch.tensor(lengths, dtype=torch.int64)
    return tensors, options


def in_pages(tensors, options, page_size):
    """The same call with its caches in shuffled pages, among pages full of garbage."""
    call = tensors | options
    batch, _, capacity, _ = call["key_cache"].shape
    pages = -(-capacity // page_size)
    table = torch.randperm(batch * pages + 2)[: batch * pages].view(batch, pages)

    def scattered(x):
        # [batch heads capacity ...] -> [pages heads page_size ...]
        pool = torch.full((batch * pages + 2, x.shape[1], page_size, *x.shape[3:]), torch.nan)
        pool = pool.to(x.dtype) if x.dtype != torch.int8 else torch.zeros_like(pool).to(x.dtype)
        for b in range(batch):
            for page in range(pages):
                rows = x[b, :, page * page_size : (page + 1) * page_size]
                pool[table[b, page], :, : rows.shape[1]] = rows
        return pool

    def moved(name, x):
        if name in ("key_cache", "value_cache"):
            return scattered(x)
        if name in ("key_scale", "value_scale") and x.shape[0] == batch and x.shape[2] == capacity:
            return scattered(x)
        return x

    # the entries of pages past the length name none
    strange = torch.tensor([-1, 2**31 - 1])[torch.randint(2, table.shape)]
    used = torch.arange(pages) * page_size < options["cache_lengths"][:, None]
    tensors = {name: moved(name, x) for name, x in tensors.items()}
    options = {name: moved(name, x) for name, x in options.items()}
    return tensors, options | {"block_table": torch.where(used, table, strange).int()}


def check(tensors, options, impl):
    call = tensors | options
    capacity = call["key_cache"].shape[2]
    if "block_table" in call:
        capacity *= call["block_table"].shape[1]
    # one sum over a head's features, then one over the keys
    reduction = max(call["query"].shape[-1], 1) * max(capacity, 1)
    assert_within_budget(
        ops.attention_decode,
        reference.attention_decode,
        tensors,
        options,
        impl=impl,
        reduction=reduction,
    )


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_feature(shape, feature, impl, dtype):
    check(*make_call(shape, FEATURES[feature], dtype), impl)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 3),
        st.sampled_from([4, 8]),
        st.sampled_from([1, 2, 4]),
        st.integers(1, 6),
        st.integers(1, 200),
        st.integers(1, 40),
        st.integers(1, 40),
    ),
    names=st.sets(st.sampled_from(sorted(FEATURES)), max_size=4),
    page_size=st.sampled_from([None, 16, 48]),
    kernel=st.sampled_from(
        [("native", torch.float32), ("native", torch.bfloat16)]
        + [("triton", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    ),
    data=st.data(),
)
def test_features_combine(shape, names, page_size, kernel, data):
    features = {k: v for name in sorted(names) for k, v in FEATURES[name].items()}
    impl, dtype = kernel
    lengths = [data.draw(st.integers(0, shape[4])) for _ in range(shape[0])]
    call = make_call(shape, features, dtype, lengths)
    if page_size is not None:
        call = in_pages(*call, page_size)
    check(*call, impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("head_dims", [(512, 512), (300, 128), (80, 80)], ids=str)
def test_large_head_dims(head_dims, impl):
    check(*make_call((1, 20, 1, 1, 70, *head_dims), {"sinks": True}, torch.bfloat16), impl)


@pytest.mark.parametrize("features", [{}, {"window": (300, -1), "sinks": True}], ids=str)
def test_more_keys_and_queries_than_a_unit_has(features, dtype):
    """Partial softmaxes over 256 keys and 64 rows each; some units have no key that is seen."""
    call = make_call((2, 6, 2, 30, 1100, 64, 48), features, dtype, [1100, 263])
    check(*call, "native")


def test_every_instruction_set(cpu_set):
    for feature in ("plain", "int8", "fp8_scaled"):
        check(*make_call((2, 8, 2, 2, 300, 40, 64), FEATURES[feature], torch.float32), "native")
    check(*make_call((3, 4, 4, 1, 97, 64, 80), {}, torch.bfloat16), "native")


@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize("feature", ["plain", "int8"])
def test_every_border_of_a_tile(cpu_set, feature, group, dtype):
    """Tiles of 4, 2 and 1 queries, of 4 and 1 vectors of values, and an odd number of keys."""
    call = make_call((2, 2 * group, 2, 1, 41, 96, 80), FEATURES[feature], dtype, [41, 18])
    check(*call, "native")


def test_any_number_of_threads_gives_the_same_bits():
    tensors, options = make_call((2, 6, 2, 3, 700, 64, 64), {}, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.attention_decode(**tensors, **options, impl="native"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_query_that_is_not_a_number_gives_none():
    tensors, options = make_call((1, 2, 2, 2, 40, 8, 8), {"sinks": True}, torch.float32, [40])
    clean = ops.attention_decode(**tensors, **options, impl="native")
    tensors["query"][0, 1, 0, 3] = torch.nan
    out = ops.attention_decode(**tensors, **options, impl="native")
    assert out[0, 1, 0].isnan().all()
    assert torch.equal(out[0, 0], clean[0, 0])
    assert torch.equal(out[0, 1, 1], clean[0, 1, 1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_attention(impl, dtype):
    """With the definition of ops.attention bit for bit, whose lengths count the keys there are."""
    tensors, options = make_call((3, 4, 2, 5, 70, 8, 8), {"window": (9, 0)}, dtype, [70, 3, 41])
    full = {
        "key": tensors["key_cache"],
        "value": tensors["value_cache"],
        "key_lengths": options["cache_lengths"],
        "causal": "bottom_right",
    }
    expected = ops.attention(tensors["query"], **full, window=(9, 0), impl="reference")
    out = ops.attention_decode(**tensors, **options, impl=impl)
    if impl == "reference":
        assert torch.equal(out, expected)
    # length 3 of 5 queries: the first two stand before the first key
    assert not out[1, :, :2].any()
    assert out[1, :, 2:].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("feature", ["plain", "int8", "fp8_scaled"])
def test_pages_equal_a_dense_cache(impl, feature):
    call = make_call((3, 4, 2, 2, 192, 8, 12), FEATURES[feature], torch.float32, [192, 0, 77])
    tensors, options = in_pages(*call, 48)
    paged = ops.attention_decode(**tensors, **options, impl=impl)
    dense = ops.attention_decode(**call[0], **call[1], impl=impl)
    assert torch.equal(paged, dense)
    # flash-attention's layout: [pages page_size heads head_dim]
    for arguments in (tensors, options):
        for name in {"key_cache", "value_cache"} & set(arguments):
            arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.attention_decode(**tensors, **options, impl=impl), dense)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_past_the_length_has_no_effect(impl, dtype):
    tensors, options = make_call((2, 4, 2, 1, 150, 8, 8), FEATURES["fp8_scaled"], dtype, [149, 3])
    clean = ops.attention_decode(**tensors, **options, impl=impl)
    for b, length in enumerate([149, 3]):
        for cache in (options["key_cache"], options["value_cache"]):
            cache[b, :, length:] = torch.nan
        for scale in (tensors["key_scale"], tensors["value_scale"]):
            scale[b, :, length:] = torch.nan
    assert torch.equal(ops.attention_decode(**tensors, **options, impl=impl), clean)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lengths_and_pages_are_clamped(impl):
    tensors, options = make_call((2, 2, 2, 2, 48, 8, 8), {}, torch.float32, [48, 0])
    expected = ops.attention_decode(**tensors, **options, impl=impl)
    options["cache_lengths"] = torch.tensor([2**40, -7])
    assert torch.equal(ops.attention_decode(**tensors, **options, impl=impl), expected)
    paged = {
        "query": tensors["query"],
        "key_cache": random(3, 2, 16, 8),
        "value_cache": random(3, 2, 16, 8),
        "cache_lengths": torch.tensor([48, 32], dtype=torch.int32),
    }
    wild = torch.tensor([[-5, 2**40, 1], [2, 3, 0]])
    tame = torch.tensor([[0, 2, 1], [2, 2, 0]])
    assert torch.equal(
        ops.attention_decode(**paged, block_table=wild, impl=impl),
        ops.attention_decode(**paged, block_table=tame, impl=impl),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_later_tokens_do_not_reach_earlier_queries(impl):
    tensors, options = make_call((1, 2, 2, 3, 40, 8, 8), {}, torch.float32, [40])
    before = ops.attention_decode(**tensors, **options, impl=impl)
    tensors["key_cache"][:, :, 39], tensors["value_cache"][:, :, 39] = 1e4, -1e4
    after = ops.attention_decode(**tensors, **options, impl=impl)
    assert torch.equal(after[:, :, :2], before[:, :, :2])
    assert not torch.equal(after[:, :, 2], before[:, :, 2])


@pytest.mark.parametrize("impl", KERNELS)
def test_any_strides(impl):
    tensors, options = make_call((2, 4, 2, 2, 70, 8, 8), {"sinks": True}, torch.float32)
    expected = ops.attention_decode(**tensors, **options, impl=impl)
    # a sequence's rows with heads inside; then columns that are not adjacent
    for a, b in ((1, 2), (2, 3)):
        moved = {
            n: tensors[n].transpose(a, b).contiguous().transpose(a, b)
            for n in tensors
            if n != "sinks"
        }
        moved["sinks"] = tensors["sinks"].repeat_interleave(2)[::2]
        assert torch.equal(ops.attention_decode(**moved, **options, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 1, 9, 8, 8), (2, 0, 0, 1, 9, 8, 8), (2, 2, 1, 0, 9, 8, 8), (2, 2, 1, 3, 0, 8, 4)],
    ids=str,
)
def test_empty(impl, shape):
    tensors, options = make_call(shape, {}, torch.float32)
    out = ops.attention_decode(**tensors, **options, impl=impl)
    assert out.shape == (*shape[:2], shape[3], shape[6])
    assert not out.any()
    # a table without pages
    if shape[0] > 0 and shape[1] > 0:
        paged = {n: random(1, shape[2], 16, x.shape[3]) for n, x in tensors.items() if n != "query"}
        table = torch.zeros(shape[0], 0, dtype=torch.int64)
        out = ops.attention_decode(
            tensors["query"], **paged, **options, block_table=table, impl=impl
        )
        assert not out.any()


def quantized_call():
    return {
        "key_cache": torch.zeros(2, 2, 32, 8, dtype=torch.int8),
        "value_cache": torch.zeros(2, 2, 32, 8, dtype=torch.int8),
        "key_scale": torch.ones(2, 1),
        "value_scale": torch.ones(()),
    }


BAD = [
    ({"query": random(4, 1, 8)}, "query must have 4 dimensions"),
    ({"query": torch.ones(2, 4, 1, 8, dtype=torch.int32)}, "query must be floating point"),
    ({"query": random(2, 3, 1, 8)}, "heads of query must be a multiple of the cache's heads"),
    ({"query": random(1, 4, 1, 8)}, r"key_cache must have shape \(batch heads_kv capacity"),
    ({"key_cache": random(2, 2, 32, 9)}, "key_cache must have shape"),
    ({"key_cache": random(2, 2, 32, 8).half()}, "key_cache must have the dtype of query"),
    ({"value_cache": random(2, 2, 31, 8)}, "value_cache must have shape"),
    ({"value_cache": random(2, 2, 32, 8).to(FP8)}, "value_cache must have the dtype of key_cache"),
    ({"cache_lengths": torch.tensor([1.0, 2.0])}, "cache_lengths must be int32 or int64"),
    ({"cache_lengths": torch.tensor([1, 2, 3])}, "cache_lengths must have shape"),
    (
        {"cache_lengths": torch.ones(2, dtype=torch.int32, device="meta")},
        "cache_lengths must be on",
    ),
    ({"block_table": torch.tensor([0, 1])}, "block_table must have shape"),
    ({"block_table": torch.zeros(2, 3)}, "block_table must be int32 or int64"),
    (
        {"block_table": torch.zeros(2, 3, dtype=torch.int32), "key_cache": random(2, 2, 24, 8)}
        | {"value_cache": random(2, 2, 24, 8)},
        "page_size must be a multiple of 16, got 24",
    ),
    (
        {"block_table": torch.zeros(2, 3, dtype=torch.int32), "key_cache": random(0, 2, 16, 8)}
        | {"value_cache": random(0, 2, 16, 8)},
        "key_cache must have at least one page",
    ),
    ({"window": (-2, 0)}, "window must have sides"),
    ({"softcap": -1.0}, "softcap must be at least 0"),
    ({"sinks": random(3)}, "sinks must have shape"),
    ({"alibi_slopes": random(3)}, "alibi_slopes must have shape"),
    ({"alibi_slopes": torch.ones(4, dtype=torch.int64)}, "alibi_slopes must be floating point"),
    (quantized_call() | {"key_scale": None}, "key_scale must be given where key_cache is int8"),
    (quantized_call() | {"value_scale": None}, "value_scale must be given"),
    (quantized_call() | {"key_scale": torch.ones(2, 2, 8)}, "key_scale must broadcast"),
    (quantized_call() | {"key_scale": torch.ones(1, 2, 2, 32)}, "key_scale must broadcast"),
    ({"query": random(2, 4, 1, 8, requires_grad=True)}, "query must not require gradients"),
    ({"sinks": random(4, requires_grad=True)}, "sinks must not require gradients"),
    ({"impl": "cuda"}, "no such implementation"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = {
        "query": random(2, 4, 1, 8),
        "key_cache": random(2, 2, 32, 8),
        "value_cache": random(2, 2, 32, 8),
        "cache_lengths": torch.tensor([3, 4]),
    }
    with pytest.raises(ValueError, match=f"attention_decode.*{message}"):
        ops.attention_decode(**(call | change))


def test_parameters_are_welcome_without_grad_mode():
    tensors, options = make_call((1, 2, 2, 1, 9, 8, 8), {"sinks": True}, torch.float32)
    expected = ops.attention_decode(**tensors, **options)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    with torch.no_grad():
        out = ops.attention_decode(**tensors, **options)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_what_the_kernel_does_not_take():
    def refusals(head_dim, dtype):
        tensors, options = make_call((1, 1, 1, 1, 9, head_dim, head_dim), {}, dtype)
        return explain(ops.attention_decode, **tensors, **options)

    taken = [("native", None), ("triton", None), ("reference", None)]
    assert refusals(512, torch.bfloat16) == taken
    assert refusals(513, torch.bfloat16)[1].reason == (
        "needs head dimensions of 1 to 512 for torch.bfloat16, got 513"
    )
    assert refusals(129, torch.float32)[1].reason == (
        "needs head dimensions of 1 to 128 for torch.float32, got 129"
    )
    assert all("float64" in refusal.reason for refusal in refusals(8, torch.float64)[:2])
    assert "float16" in refusals(8, torch.float16)[0].reason


def test_autocast_casts_the_query():
    tensors, options = make_call((1, 2, 2, 1, 9, 8, 8), {}, torch.bfloat16)
    expected = ops.attention_decode(**tensors, **options)
    with torch.autocast(tensors["query"].device.type, dtype=torch.bfloat16):
        wide = tensors | {"query": tensors["query"].float()}
        assert torch.equal(ops.attention_decode(**wide, **options), expected)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(page_size, impl, dtype):
    torch._dynamo.reset()
    tensors, options = make_call((2, 4, 2, 2, 70, 8, 6), FEATURES["int8"], dtype)
    if page_size is not None:
        tensors, options = in_pages(tensors, options, page_size)
    options["impl"] = impl
    compiled = torch.compile(ops.attention_decode, fullgraph=True, backend="aot_eager")
    expected = ops.attention_decode(**tensors, **options)
    out = compiled(**tensors, **options)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()


@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl):
    tensors, options = make_call(
        (2, 4, 2, 2, 70, 8, 6), FEATURES["int8"] | FEATURES["sinks"], torch.float32
    )
    tensors, options = in_pages(tensors, options, 16)
    call = tensors | options
    names = ("query", "key_cache", "value_cache", "cache_lengths", "block_table")
    names += ("key_scale", "value_scale", "sinks")
    operator = {"native": "attention_decode", "triton": "attention_decode_triton"}[impl]
    torch.library.opcheck(
        getattr(torch.ops.llmos_fast, operator).default,
        (*(call[name] for name in names), None, 0.3, -1, 0.0),
    )
