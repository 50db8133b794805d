"""What only a GPU can show of rotary: real sizes, packed projections, graphs."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

DEVICE = torch.device("cuda", torch.cuda.current_device())


def call_of(head_dim, half, dtype, batch=2, seq=515):
    """Query and key are slices of a packed projection."""
    packed = random(batch, seq, 40, head_dim, dtype=dtype).to(DEVICE).transpose(1, 2)
    query, key = (t.requires_grad_() for t in packed.split((32, 8), dim=1))
    table = random(4096, half).to(DEVICE)
    positions = torch.randint(4096, (batch, seq), device=DEVICE)
    return {
        "query": query, "key": key, "cos": table.cos(), "sin": table.sin(), "positions": positions,
    }  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (128, 64), (256, 128), (80, 16), (7, 3)])
def test_within_the_budget(head_dim, half, dtype, interleaved):
    assert_within_budget(
        ops.rotary,
        reference.rotary,
        call_of(head_dim, half, dtype),
        {"interleaved": interleaved},
        impl="triton",
        reduction=2,
    )


@pytest.mark.parametrize("seq", [1, 300])
def test_a_graph_follows_positions(captured, seq):
    call = call_of(128, 64, torch.bfloat16, seq=seq)
    with torch.no_grad():
        graph, out = captured(lambda: ops.rotary(**call, impl="triton"))
        for _ in range(3):
            call["positions"].copy_(torch.randint(4096, (2, seq)))
            graph.replay()
            expected = ops.rotary(**call, impl="triton")
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_in_place():
    call = {n: t.detach() for n, t in call_of(128, 64, torch.bfloat16).items()}
    expected = ops.rotary(**call, impl="triton")
    ops.rotary(**call, inplace=True, impl="triton")
    assert torch.equal(call["query"], expected[0])
    assert torch.equal(call["key"], expected[1])
