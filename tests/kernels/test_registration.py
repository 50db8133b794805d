"""The GPU kernels as torch.library ops: schemas, fake tensors, compilation, second derivatives."""

import pytest
import torch

from llmos_fast import explain, ops, reference
from llmos_fast.testing import (
    assert_close_to_truth,
    outputs_and_gradients,
    random,
    registered_calls,
)


def dense(dtype=torch.float32):
    tensors = {
        "query": random(2, 4, 5, 8, dtype=dtype, requires_grad=True),
        "key": random(2, 2, 7, 8, dtype=dtype, requires_grad=True),
        "value": random(2, 2, 7, 6, dtype=dtype, requires_grad=True),
        "bias": random(1, 4, 1, 7, dtype=dtype, requires_grad=True),
        "sinks": random(4, dtype=dtype, requires_grad=True),
        "key_lengths": torch.tensor([7, 5]),
    }
    return tensors, {"causal": "bottom_right", "softcap": 4.0, "return_lse": True, "impl": "triton"}


def packed(dtype=torch.float32):
    tensors = {n: random(9, 2, 8, dtype=dtype, requires_grad=True) for n in ("query", "key")}
    tensors["value"] = random(9, 2, 8, dtype=dtype, requires_grad=True)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    return tensors, {"cu_seqlens": (cu, cu, 5, 5), "causal": True, "impl": "triton"}


def recorded(tensors, options):
    """Every registered op that a call and its gradients reach, with its arguments."""
    with registered_calls() as calls:
        outputs_and_gradients(ops.attention, tensors, options)
    return calls


@pytest.mark.parametrize("call", [dense, packed], ids=["dense", "packed"])
def test_opcheck(call):
    tensors, options = call()
    calls = recorded(tensors, options | {"dropout_p": 0.25})
    assert set(calls) == {"llmos_fast::attention_triton", "llmos_fast::attention_triton_backward"}
    for function, arguments in calls.values():
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(function, plain)


@pytest.mark.parametrize("call", [dense, packed], ids=["dense", "packed"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_in_one_graph(call, dtype):
    torch._dynamo.reset()
    tensors, options = call(dtype)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    eager_out, eager_gradients = outputs_and_gradients(ops.attention, tensors, options)
    out, gradients = outputs_and_gradients(compiled, tensors, options)
    for ours, theirs in zip(out, eager_out, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, eager_gradients[name]), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq in (9, 14):
        x = random(2, 2, seq, 8)
        assert torch.equal(
            compiled(x, x, x, causal=True, impl="triton"),
            ops.attention(x, x, x, causal=True, impl="triton"),
        )


def test_gradients_of_gradients():
    """Differentiating the gradients of the kernels gives what the definition gives."""

    def second(function, tensors, options):
        wanted = [t for t in tensors.values() if t.requires_grad]
        torch.manual_seed(0)
        out, lse = function(**tensors, **options)
        first = torch.autograd.grad(
            (out.square().sum() + lse.square().sum()), wanted, create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    tensors, options = dense()
    options["dropout_p"] = 0.25
    ours = second(ops.attention, tensors, options)
    del options["impl"]
    eager = second(reference.attention, tensors, options)
    wide = {
        n: t.detach().double().requires_grad_() if t.requires_grad else t
        for n, t in tensors.items()
    }
    truth = second(reference.attention, wide, options)
    for out, low, true in zip(ours, eager, truth, strict=True):
        # the reduction counts both differentiations, each of up to 100 terms
        assert_close_to_truth(out, low, true, reduction=10_000)


def test_without_forcing_cpu_tensors_stay_with_the_compiled_kernels():
    x = random(1, 1, 2, 8)
    assert explain(ops.attention, x, x, x)[:2] == [("native", None), ("triton", None)]


def test_shapes_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.empty(2, 4, 5, 8, device="cuda"), torch.empty(2, 2, 7, 8, device="cuda")
        out = torch.ops.llmos_fast.attention_triton(
            q, k, k, None, None, None, None, None, 0, 0, None, None, "", -1, -1, 0.0, 0.0, None, 1.0
        )
    assert [tuple(t.shape) for t in out] == [(2, 4, 5, 8), (2, 4, 5)]
    assert out[0].device.type == "cuda"
