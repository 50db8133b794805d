"""Writes to a cache: against a loop over rows, and read back by attention_decode."""

import pytest
import torch

from llmos_fast import explain, ops
from llmos_fast.testing import random

IMPLEMENTATIONS = ["native", "reference"]


def rounded(x):
    """(int8 row, its scale) by the rule in the op's docstring."""
    amax = x.float().abs().max()
    if not amax.isfinite():
        return torch.zeros_like(x, dtype=torch.int8), torch.tensor(torch.nan)
    factor = torch.where(amax > 0, torch.full_like(amax, 127.0) / amax, 0.0)
    return (x.float() * factor).round().to(torch.int8), amax / 127


def expected(call):
    """What the caches and scales hold after the call, row by row."""
    after = {n: call[n].clone() for n in CHANGED if call.get(n) is not None}
    key, lengths, table = call["key"], call["cache_lengths"], call.get("block_table")
    batch, heads, seq, _ = key.shape
    pages, _, page_size, _ = call["key_cache"].shape
    capacity = page_size * (1 if table is None else table.shape[1])
    for b in range(batch):
        for i in range(seq):
            position = int(lengths[b]) - seq + i
            if not 0 <= position < capacity:
                continue
            page = b if table is None else int(table[b, position // page_size])
            if not 0 <= page < pages:
                continue
            for name in ("key", "value"):
                for head in range(heads):
                    at, row = (page, head, position % page_size), call[name][b, head, i]
                    if f"{name}_scale" in after:
                        row, after[f"{name}_scale"][at] = rounded(row)
                    after[f"{name}_cache"][at] = row
    return after


CHANGED = ("key_cache", "value_cache", "key_scale", "value_scale")


def make_call(dtype, lengths, *, seq=3, pages=None, quantized=False, head_dims=(20, 33)):
    batch, heads = len(lengths), 2
    count, rows = (batch, 50) if pages is None else (9, 16)
    call = {"cache_lengths": torch.tensor(lengths)}
    for name, width in zip(("key", "value"), head_dims, strict=True):
        call[name] = random(batch, seq, heads, width, dtype=dtype).transpose(1, 2)
        cache = random(count, heads, rows, width, dtype=dtype)
        call[f"{name}_cache"] = cache.char() if quantized else cache
        if quantized:
            call[f"{name}_scale"] = torch.rand(count, heads, rows)
    if pages is not None:
        call["block_table"] = torch.tensor(pages)
    return call


def check(call, impl):
    wanted = expected(call)
    assert ops.cache_write(**call, impl=impl) is None
    for name, tensor in wanted.items():
        torch.testing.assert_close(call[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("seq", [1, 3])
def test_dense(seq, quantized, impl, dtype):
    check(make_call(dtype, [50, 3, 17], seq=seq, quantized=quantized), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_pages(index, quantized, impl, dtype):
    pages = [[3, 8, 1], [0, -1, 2**31 - 1], [7, 2, 5]]
    # the second sequence's new rows lie on its first page and on one that does not exist
    call = make_call(dtype, [48, 17, 33], pages=pages, quantized=quantized)
    call["block_table"], call["cache_lengths"] = (
        call["block_table"].to(index),
        call["cache_lengths"].to(index),
    )
    check(call, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_positions_outside_of_the_cache(impl):
    check(make_call(torch.float32, [1, 52, -(2**62), 2**62]), impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_of_zeros_and_of_no_numbers(impl):
    call = make_call(torch.float32, [9, 9, 9], quantized=True)
    call["key"][0], call["key"][1, :, :, 3], call["value"][2, :, :, 1] = 0.0, torch.nan, torch.inf
    check(call, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 2, 1, 8), (2, 0, 1, 8), (2, 2, 0, 8), (2, 2, 1, 0)], ids=str)
def test_empty(impl, shape):
    batch, heads, _, width = shape
    cache = torch.ones(batch, heads, 5, width)
    lengths = torch.ones(batch, dtype=torch.int64)
    key, value = torch.zeros(shape), torch.zeros(shape)
    ops.cache_write(key, value, cache, cache.clone(), lengths, impl=impl)
    ops.cache_write(key, value, cache[:, :, :0], cache[:, :, :0], lengths, impl=impl)


def test_every_instruction_set(cpu_set):
    check(make_call(torch.float32, [50, 3, 17], quantized=True), "native")
    check(make_call(torch.bfloat16, [50, 3, 17]), "native")


def test_attention_finds_what_was_written(dtype):
    call = make_call(dtype, [7, 50, 30], seq=1, head_dims=(16, 16))
    ops.cache_write(**call)
    query = random(3, 4, 1, 16, dtype=dtype)
    caches = {n: call[n] for n in ("key_cache", "value_cache", "cache_lengths")}
    before = ops.attention_decode(query, **caches)
    call["value_cache"][0, :, 6] += 100
    assert (ops.attention_decode(query, **caches) - before)[0].abs().min() > 0


def test_strided_caches_and_scales():
    call = make_call(torch.float32, [50, 3, 17], quantized=True)
    for name in CHANGED:
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(call, "native")
    # columns apart: only the definition takes them
    call["key_cache"] = call["key_cache"].transpose(2, 3).contiguous().transpose(2, 3)
    assert "contiguous rows" in explain(ops.cache_write, **call)[0].reason
    check(call, "auto")


BAD = [
    ({"key": random(2, 1, 8)}, "key must have 4 dimensions"),
    ({"value": random(2, 2, 2, 8)}, "value must have shape"),
    ({"value": random(2, 2, 1, 8).bfloat16()}, "value must have the dtype of key"),
    ({"key_cache": random(2, 3, 32, 8)}, "key_cache must have shape"),
    ({"key_cache": random(2, 2, 32, 8).half()}, "key_cache must be torch.float32, as key, or int8"),
    ({"value_cache": random(2, 2, 31, 8)}, "value_cache must have shape"),
    ({"cache_lengths": torch.ones(2)}, "cache_lengths must be int32 or int64"),
    ({"cache_lengths": torch.tensor([1])}, "cache_lengths must have shape"),
    ({"block_table": torch.zeros(2, 3)}, "block_table must be int32 or int64"),
    ({"key_scale": torch.ones(2, 2, 32)}, "key_scale must be given for an int8 cache only"),
    ({"key_cache": torch.zeros(2, 2, 32, 8).char()}, "key_scale must be given for an int8 cache"),
    (
        {"key_cache": torch.zeros(2, 2, 32, 8).char(), "key_scale": torch.ones(2, 2, 1)},
        "key_scale must have shape",
    ),
    (
        {"key_cache": torch.zeros(2, 2, 32, 8).char(), "key_scale": torch.ones(2, 2, 32).half()},
        "key_scale must be float32",
    ),
    ({"key": random(2, 2, 1, 8, requires_grad=True)}, "key must not require gradients"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    call = {
        "key": random(2, 2, 1, 8),
        "value": random(2, 2, 1, 8),
        "key_cache": random(2, 2, 32, 8),
        "value_cache": random(2, 2, 32, 8),
        "cache_lengths": torch.tensor([3, 4]),
    }
    with pytest.raises(ValueError, match=f"cache_write: {message}"):
        ops.cache_write(**(call | change))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph_and_opcheck():
    torch._dynamo.reset()
    call = make_call(torch.float32, [50, 3, 17], quantized=True)
    wanted = expected(call)

    def write(**call):
        ops.cache_write(**call)
        return call["key_cache"].sum(), call["key_scale"].sum()

    torch.compile(write, fullgraph=True, backend="aot_eager")(**call)
    for name in CHANGED:
        assert torch.equal(call[name], wanted[name])
    arguments = [call[n] for n in ("key", "value", "key_cache", "value_cache", "cache_lengths")]
    scales = [call[n] for n in ("key_scale", "value_scale")]
    torch.library.opcheck(torch.ops.llmos_fast.cache_write.default, (*arguments, None, *scales))
