"""A new token's keys and values into a cache, beside an assignment to a slice and index_put_."""

import pytest
import torch

from llmos_fast import ops

SHAPES = [(1, 12, 1024, 64), (8, 8, 4096, 128)]  # batch, heads, capacity, head_dim


@pytest.mark.parametrize("cache", ["fp32", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def bench_cache_write(compare, smoke, shape, cache):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    batch, heads, capacity, head_dim = shape
    key, value = torch.randn(2, batch, heads, 1, head_dim)
    lengths = torch.arange(capacity, capacity - batch, -1)
    keys, values = torch.zeros(2, *shape)
    call = {"key_cache": keys, "value_cache": values}
    if cache == "int8":
        call = {name: t.char() for name, t in call.items()}
        call |= {f"{name}_scale": torch.ones(shape[:3]) for name in ("key", "value")}
    rows = torch.arange(batch)

    def ours():
        ops.cache_write(key, value, cache_lengths=lengths, **call)

    def slices():
        keys[:, :, -1:], values[:, :, -1:] = key, value

    def index_put():
        keys[rows, :, lengths - 1], values[rows, :, lengths - 1] = key[:, :, 0], value[:, :, 0]

    def check():
        ours()
        index_put()
        if cache == "fp32":
            assert torch.equal(call["key_cache"], keys)
            assert torch.equal(call["value_cache"], values)
        else:
            torch.testing.assert_close(
                call["value_cache"] * call["value_scale"][..., None], values, rtol=0, atol=0.02
            )

    compare(
        ours,
        {} if cache == "int8" else {"slices": slices, "index_put": index_put},
        check=check,
        bytes=4 * key.nbytes,
        rounds=50,
    )
