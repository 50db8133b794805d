"""What only a GPU can show of ffn and gated_ffn: every launch at real sizes, graphs, repetition."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.product_launch import TABLE, UNALIGNED
from llmos_fast.kernels.runtime import architecture

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

DEVICE = torch.device("cuda", torch.cuda.current_device())
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ARCH = architecture(DEVICE)


def call_of(op, rows, features, hidden, dtype):
    def leaf(*shape, scale=1.0):
        return random(*shape, dtype=dtype, scale=scale).to(DEVICE).requires_grad_()

    up, down = features**-0.5, hidden**-0.5
    tensors = {"x": leaf(rows, features), "residual": leaf(rows, features)}
    if op == "ffn":
        return tensors | {
            "w1": leaf(hidden, features, scale=up),
            "b1": leaf(hidden),
            "w2": leaf(features, hidden, scale=down),
            "b2": leaf(features),
        }
    return tensors | {
        "w_gate": leaf(hidden, features, scale=up),
        "w_up": leaf(hidden, features, scale=up),
        "w_down": leaf(features, hidden, scale=down),
        "b_gate": leaf(hidden),
        "b_up": leaf(hidden),
        "b_down": leaf(features),
    }


def check(op, tensors, **options):
    assert_within_budget(
        getattr(ops, op),
        getattr(reference, op),
        tensors,
        options,
        impl="triton",
        reduction=2 * max(max(t.shape) for t in tensors.values()),
    )


def launches(kernel, accumulators, dtype):
    return (*TABLE[kernel][ARCH][dtype.itemsize][accumulators], UNALIGNED[dtype.itemsize])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_every_launch_is_within_the_budget(op, dtype, recompute):
    gated = op == "gated_ffn"
    tensors = call_of(op, 515, 768, 2056, dtype)
    for launch in launches("product", 1 + gated, dtype):
        with forced(product=launch):
            check(op, tensors, dropout_p=0.1, recompute=recompute)
    for launch in launches("ffn_backward", 1 + recompute + (recompute and gated), dtype):
        with forced(ffn_backward=launch):
            check(op, tensors, dropout_p=0.1, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 64, 65, 129])
@pytest.mark.parametrize("features", [768, 1023])
def test_few_rows_and_odd_columns(op, rows, features, dtype):
    check(op, call_of(op, rows, features, 3001 if features % 2 else 3072, dtype), dropout_p=0.1)


@pytest.mark.parametrize("rows", [16, 4096])
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_the_same_from_run_to_run(op, rows):
    tensors = call_of(op, rows, 1024, 4096, torch.bfloat16)

    def run():
        out = getattr(ops, op)(**tensors, impl="triton")
        return [out, *torch.autograd.grad(out, tensors.values(), torch.ones_like(out))]

    expected = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_a_graph_follows_its_input(captured, op, rows):
    tensors = call_of(op, rows, 768, 3072, torch.bfloat16)
    with torch.no_grad():
        graph, out = captured(lambda: getattr(ops, op)(**tensors, impl="triton"))
        for _ in range(3):
            tensors["x"].copy_(random(rows, 768))
            graph.replay()
            assert torch.equal(out, getattr(ops, op)(**tensors, impl="triton"))


def test_two_streams_do_not_share_counters():
    tensors = call_of("ffn", 4, 2048, 2048, torch.bfloat16)
    with torch.no_grad():
        expected = ops.ffn(**tensors, impl="triton")
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(4)]
        found = []
        for _ in range(50):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(ops.ffn(**tensors, impl="triton"))
        torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in found)
