"""What only a GPU can show of attention to a cache: its launches, graphs, and two at a time."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast.kernels.attention_decode import LARGEST_HEAD_DIM

from llmos_fast import ops, reference
from llmos_fast.testing import (
    assert_close_to_truth,
    assert_within_budget,
    native_precision,
    random,
)

DEVICE = torch.device("cuda", torch.cuda.current_device())


def on_gpu(*shape, dtype=torch.bfloat16):
    return random(*shape, dtype=dtype).to(DEVICE)


def in_pages(cache, page_size=64):
    """[batch heads rows d] -> [pages heads page_size d]."""
    return cache.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)


def decode_call(paged, lengths=(5000, 1, 0)):
    """Tensors of a call with few heads and many keys, so that keys are split."""
    call = {n: on_gpu(3, 2, 8192, 128) for n in ("key_cache", "value_cache")}
    if paged:
        call = {n: in_pages(x) for n, x in call.items()}
        call["block_table"] = torch.randperm(3 * 128, device=DEVICE).view(3, 128)
    call["query"] = on_gpu(3, 8, 1, 128)
    call["cache_lengths"] = torch.tensor(lengths, device=DEVICE)
    return call


@pytest.mark.parametrize("paged", [False, True])
def test_a_graph_follows_lengths_and_pages(captured, paged):
    call = decode_call(paged)
    graph, out = captured(lambda: ops.attention_decode(**call, impl="triton"))
    for lengths in ([5000, 1, 0], [8192, 4097, 64], [1, 8192, 3000]):
        call["cache_lengths"].copy_(torch.tensor(lengths))
        if paged:
            call["block_table"].copy_(call["block_table"].flip(0))
        graph.replay()
        assert torch.equal(out, ops.attention_decode(**call, impl="triton"))
        assert_close_to_decode(out, call)


def assert_close_to_decode(out, call):
    in_double = {n: t.double() if t.is_floating_point() else t for n, t in call.items()}
    truth = reference.attention_decode(**in_double)
    with native_precision():
        eager = reference.attention_decode(**call)
    assert_close_to_truth(out, eager, truth, reduction=8192)


def test_two_streams_at_once():
    """The last block of a split is found by a counter, which two launches must not share."""
    calls = [decode_call(False, lengths) for lengths in ((8192, 100, 3), (64, 7000, 8192))]
    expected = [ops.attention_decode(**call, impl="triton") for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(200):
        for stream, call, found in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.attention_decode(**call, impl="triton"))
    torch.cuda.synchronize()
    for found, one in zip(results, expected, strict=True):
        assert all(torch.equal(out, one) for out in found)


KEYS = [
    (dtype, head_dim)
    for dtype in (torch.bfloat16, torch.float32)
    for head_dim in (64, 128, 256, 512)
    if head_dim <= LARGEST_HEAD_DIM[dtype.itemsize]
]


@pytest.mark.parametrize("storage", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("group_rows", [1, 8, 24, 48])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_every_launch_is_within_the_budget(key, group_rows, paged, storage):
    dtype, head_dim = key
    tensors = {"query": on_gpu(2, 2 * group_rows, 1, head_dim, dtype=dtype)}
    options = {"cache_lengths": torch.tensor([3008, 1234], device=DEVICE)}
    for name in ("key", "value"):
        cache = on_gpu(2, 2, 3008, head_dim, dtype=dtype)
        cache = in_pages(cache) if paged else cache
        if storage is None:
            tensors[f"{name}_cache"] = cache
        else:
            # whole numbers, which all of these types hold
            options[f"{name}_cache"] = (4 * cache).round().clamp(-8, 8).to(storage)
            tensors[f"{name}_scale"] = torch.tensor(0.25, device=DEVICE)
    if paged:
        options["block_table"] = torch.randperm(2 * 47, device=DEVICE).view(2, 47)
    assert_within_budget(
        ops.attention_decode,
        reference.attention_decode,
        tensors,
        options,
        impl="triton",
        reduction=3008 * head_dim,
    )
