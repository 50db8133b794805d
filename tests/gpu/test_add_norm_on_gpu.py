"""What only a GPU can show of add_norm and dropout: every launch at real sizes, and graphs."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

DEVICE = torch.device("cuda", torch.cuda.current_device())
ROWS = 1027
# several rows in a tile, one row, the widest that registers hold, and rows cut into blocks
WIDTHS = [64, 200, 768, 1024, 4096, 5120, 8192, 12288, 16384, 32768, 50_001, 65536]


def on_gpu(*shape, dtype=torch.bfloat16):
    return random(*shape, dtype=dtype).to(DEVICE).requires_grad_()


def call_of(rows, features, dtype, residual_dtype):
    return {
        "x": on_gpu(rows, features, dtype=dtype),
        "residual": None
        if residual_dtype is None
        else on_gpu(rows, features, dtype=residual_dtype),
        "weight": on_gpu(features, dtype=dtype),
        "bias": on_gpu(features, dtype=dtype),
    }


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("features", WIDTHS)
def test_every_launch_is_within_the_budget(features, dtype, kind, dropout_p):
    for residual_dtype in (dtype, torch.float32, None):
        assert_within_budget(
            ops.add_norm,
            reference.add_norm,
            call_of(ROWS, features, dtype, residual_dtype),
            {"kind": kind, "dropout_p": dropout_p},
            impl="triton",
            reduction=max(ROWS, features),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1, 64, 200, 4096, 50_001])
def test_dropout_draws_the_bits_of_the_definition(columns, dtype):
    x = torch.ones(ROWS, columns, dtype=dtype, device=DEVICE)
    torch.manual_seed(7)
    ours = ops.dropout(x, 0.5, impl="triton")
    torch.manual_seed(7)
    assert torch.equal(ours, reference.dropout(x, 0.5))


@pytest.mark.parametrize("features", [256, 4096, 16384])
def test_the_same_from_run_to_run(features):
    call = call_of(4096, features, torch.bfloat16, torch.bfloat16)
    leaves = list(call.values())

    def run():
        outputs = ops.add_norm(**call, impl="triton")
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
        return [*outputs, *gradients]

    expected = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.parametrize("features", [768, 16384])
def test_a_graph_follows_its_input(captured, features):
    call = call_of(300, features, torch.bfloat16, torch.bfloat16)
    with torch.no_grad():
        graph, (norm, total) = captured(lambda: ops.add_norm(**call, impl="triton"))
        for _ in range(2):
            call["x"].copy_(random(300, features))
            graph.replay()
            expected_norm, expected_total = ops.add_norm(**call, impl="triton")
            assert torch.equal(norm, expected_norm)
            assert torch.equal(total, expected_total)
