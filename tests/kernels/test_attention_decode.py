"""How the GPU kernel of attention_decode is cut: splits, launches, counters."""

from dataclasses import fields
from itertools import product

import pytest
import torch
from llmos_fast.kernels import attention_decode as kernel

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

FP8 = torch.float8_e4m3fn


def make_call(shape, lengths, dtype=torch.float32, storage=None):
    """(tensors, options) for ops.attention_decode with a dense cache."""
    batch, heads_q, heads_kv, seq_q, capacity, head_dim, head_dim_v = shape
    tensors = {
        "query": random(batch, heads_q, seq_q, head_dim, dtype=dtype),
        "key_cache": random(batch, heads_kv, capacity, head_dim, dtype=storage or dtype),
        "value_cache": random(batch, heads_kv, capacity, head_dim_v, dtype=storage or dtype),
    }
    return tensors, {"cache_lengths": torch.tensor(lengths)}


def check(tensors, options):
    reduction = tensors["query"].shape[-1] * tensors["key_cache"].shape[2]
    assert_within_budget(
        ops.attention_decode,
        reference.attention_decode,
        tensors,
        options,
        impl="triton",
        reduction=reduction,
    )


@pytest.fixture
def launched(monkeypatch):
    """What the kernel was launched with, call by call; its counters must be zero before."""
    calls = []
    launch = kernel.launch

    def watched(*args, **call):
        partials = call["partials"]
        assert partials is None or not partials.counters.any()
        launch(*args, **call)
        calls.append(call)

    monkeypatch.setattr(kernel, "launch", watched)
    return calls


def split_into(monkeypatch, splits):
    """Cut the keys into that many parts, however short they are."""
    monkeypatch.setattr(kernel, "num_splits", lambda *_: splits)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 40])
def test_any_number_of_splits(monkeypatch, splits, dtype):
    lengths = [0, 1, 64, 65, 400, 448]
    tensors, options = make_call((6, 4, 2, 3, 448, 8, 8), lengths, dtype)
    tensors["sinks"] = random(4, dtype=dtype)
    split_into(monkeypatch, splits)
    check(tensors, options | {"softcap": 2.0})


def test_splits_have_a_fixed_order_and_leave_zero_counters(monkeypatch, launched):
    tensors, options = make_call((2, 40, 1, 2, 640, 8, 8), [640, 300])
    split_into(monkeypatch, 10)
    runs = [ops.attention_decode(**tensors, **options, impl="triton") for _ in range(2)]
    assert torch.equal(*runs)
    assert len(launched) == 2
    assert all(not call["partials"].counters.any() for call in launched)
    # every split of the first sequence took part, and half of those of the second
    statistics = launched[0]["partials"].statistics
    sums = statistics.view(2, -1, 10, 2, statistics.shape[-1])[..., 1, :]
    assert sums[0].isfinite().all()
    assert sums[1, :, :5].isfinite().all()
    assert sums[1, :, 5:].isnan().all()


def test_a_window_skips_what_is_before_it(monkeypatch, launched):
    """Only the splits of the window's own tiles have anything to write."""
    tensors, options = make_call((1, 1, 1, 1, 640, 8, 8), [640])
    split_into(monkeypatch, 10)
    check(tensors, options | {"window": (150, 0)})
    statistics = launched[0]["partials"].statistics
    assert int(statistics[:, 0, 0].isnan().sum()) == 10 - 3


@pytest.mark.parametrize("heads_kv", [1, 2, 8])
@pytest.mark.parametrize("batch", [1, 16, 500])
def test_splits_fill_the_processors_and_no_more(heads_kv, batch):
    for keys in (1, 64, 1000, 16_000, 1_000_000):
        tiles = -(-keys // 64)
        splits = kernel.num_splits(batch * heads_kv, tiles, 64, 8.0, 132)
        assert 1 <= splits <= tiles
        assert splits == 1 or batch * heads_kv * (splits - 1) < 2 * 132
        if keys == 1_000_000:
            assert batch * heads_kv * splits > 132
    assert kernel.num_splits(batch * heads_kv, 0, 64, 8.0, 132) == 1


def test_every_launch_that_is_chosen_is_listed(launched):
    for head_dim, heads, dtype, storage, paged in product(
        (1, 100), (1, 20), (torch.float32, torch.float16), (None, FP8), (False, True)
    ):
        tensors, options = make_call((1, heads, 1, 1, 16, head_dim, 1), [16], dtype, storage)
        if paged:
            options["block_table"] = torch.zeros(1, 1, dtype=torch.int32)
        ops.attention_decode(**tensors, **options, impl="triton")
    names = [field.name for field in fields(kernel.DecodeLaunch)]
    chosen = {kernel.DecodeLaunch(**{name: call[name] for name in names}) for call in launched}
    assert len(chosen) > 8
    assert chosen <= set(kernel.launches())
