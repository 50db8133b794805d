"""rotary: query and key of a packed projection, read once and written once.

On a GPU it stands beside eager PyTorch, torch.compile and Liger-Kernel, which has the halves form.
"""

import pytest
import torch

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

from .cuda import compiled
from .marks import lenient, needs_gpu

DEVICE = "cuda"
GPU_SHAPES = [(8, 32, 8, 4096, 128), (4, 12, 12, 1024, 64), (64, 32, 8, 1, 128)]  # B, Hq, Hk, T, D


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("seq", [32, 512])
def bench_rotary(compare, smoke, seq, interleaved):
    if smoke and seq != 32:
        pytest.skip("not in a smoke run")
    tensors = {
        "query": random(4, 12, seq, 64),
        "key": random(4, 4, seq, 64),
        "cos": random(seq, 32),
        "sin": random(seq, 32),
    }
    options = {"interleaved": interleaved}

    def check():
        assert_within_budget(
            ops.rotary, reference.rotary, tensors, options, impl="auto", reduction=2
        )

    compare(
        lambda: ops.rotary(**tensors, **options),
        {"eager": lambda: reference.rotary(**tensors, **options)},
        check=check,
        bytes=2 * (tensors["query"].nbytes + tensors["key"].nbytes),
    )


def eager_rotary(query, key, cos, sin):
    """The halves form by operators of PyTorch, as models write it."""

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return turn(query), turn(key)


def liger_rotary(query, key, cos, sin):
    """Liger-Kernel, whose tables hold each angle twice."""
    from liger_kernel.transformers.functional import liger_rope

    twice = (torch.cat((t, t), dim=-1)[None] for t in (cos, sin))
    return liger_rope(query, key, *twice)


@needs_gpu
@lenient
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def bench_rotary_gpu(compare, smoke, shape, dtype, direction):
    if smoke and shape != GPU_SHAPES[1]:
        pytest.skip("not in a smoke run")
    batch, heads_q, heads_k, seq, head_dim = shape
    train = direction == "forward_backward"
    packed = random(batch, seq, heads_q + heads_k, head_dim, dtype=dtype).to(DEVICE).transpose(1, 2)
    query, key = packed.split((heads_q, heads_k), dim=1)
    angle = random(seq, head_dim // 2).to(DEVICE)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    leaves = [query.requires_grad_(train), key.requires_grad_(train)]
    directions = [torch.ones_like(t) for t in leaves]

    def runner(function):
        def run():
            outputs = function(query, key, cos, sin)
            if train:
                torch.autograd.grad(outputs, leaves, directions)

        return run

    def ours(*tensors):
        return ops.rotary(*tensors, impl="triton")

    def check():
        names = ("query", "key", "cos", "sin")
        tensors = dict(zip(names, (query, key, cos, sin), strict=True))
        assert_within_budget(ops.rotary, reference.rotary, tensors, {}, impl="triton", reduction=2)

    peers = {
        "eager": eager_rotary, "compile": compiled(eager_rotary), "liger": liger_rotary,
    }  # fmt: skip
    compare(
        runner(ours),
        {name: runner(peer) for name, peer in peers.items()},
        check=check,
        bytes=(4 if train else 2) * (query.nbytes + key.nbytes),
        dtype=dtype,
        rounds=20,
        device=DEVICE,
    )
