"""ffn and gated_ffn beside eager PyTorch and torch.compile.

On a GPU also beside cuBLASLt's own epilogue, which has bias with ReLU or the tanh form of GELU, and
Liger-Kernel, which fuses the gate; and apart, as a baseline, the bare products by cuBLAS.
"""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

from .cuda import compiled
from .marks import lenient, needs_gpu

DEVICE = "cuda"
# Inductor may take its time to find the best kernels
MODE = "max-autotune-no-cudagraphs"
GPU_SHAPES = [  # rows, features, hidden
    (1, 4096, 11008),
    (16, 4096, 11008),
    (1024, 768, 3072),
    (8192, 768, 3072),
    (8192, 2048, 5632),
    (4096, 4096, 16384),
    (32768, 4096, 11008),
    (4096, 8192, 22016),
]


SHAPES = [(64, 128, 512), (1024, 256, 1024), (1024, 768, 3072)]  # rows, features, hidden


def eager_ffn(x, w1, b1, w2, b2, dropout_p):
    hidden = F.dropout(F.gelu(F.linear(x, w1, b1)), dropout_p)
    return F.linear(hidden, w2, b2)


def eager_gated(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


# torch.compile imports what torch itself has deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_ffn(compare, step, smoke, shape, dtype, dropout_p):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    rows, features, hidden = shape
    grad = {"dtype": dtype, "requires_grad": True}
    scale = features**-0.5
    tensors = {
        "x": random(rows, features, **grad),
        "w1": random(hidden, features, scale=scale, **grad),
        "b1": random(hidden, **grad),
        "w2": random(features, hidden, scale=scale, **grad),
        "b2": random(features, **grad),
    }
    values = tuple(tensors.values())

    def check():
        options = {"dropout_p": dropout_p}
        few = tensors | {"x": tensors["x"][:16].detach().requires_grad_()}
        assert_within_budget(
            ops.ffn, reference.ffn, few, options, impl="auto", reduction=2 * hidden
        )

    def eager(*t):
        return eager_ffn(*t, dropout_p)

    peers = {"eager": step(eager, *values)}
    if not smoke:
        torch._dynamo.reset()
        peers["compile"] = step(torch.compile(eager), *values)
    compare(
        step(lambda *t: ops.ffn(*t, dropout_p=dropout_p), *values),
        peers,
        check=check,
        flops=3 * 4 * rows * features * hidden,
        bytes=4 * values[1].nbytes,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_gated_ffn(compare, step, smoke, shape, dtype):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    rows, features, hidden = shape
    grad = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "x": random(rows, features, **grad),
        "w_gate": random(hidden, features, scale=features**-0.5, **grad),
        "w_up": random(hidden, features, scale=features**-0.5, **grad),
        "w_down": random(features, hidden, scale=hidden**-0.5, **grad),
    }
    values = tuple(tensors.values())

    def check():
        few = tensors | {"x": tensors["x"][:16].detach().requires_grad_()}
        assert_within_budget(
            ops.gated_ffn, reference.gated_ffn, few, impl="auto", reduction=2 * hidden
        )

    compare(
        step(ops.gated_ffn, *values),
        {"eager": step(eager_gated, *values)},
        check=check,
        flops=3 * 6 * rows * features * hidden,
        bytes=6 * values[1].nbytes,
        dtype=dtype,
    )


def eager_gelu_tanh(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def cublas_epilogue(x, w1, b1, w2, b2):
    """Bias and activation by cuBLASLt; it has no gradient."""
    hidden = torch._addmm_activation(b1, x, w1.t(), use_gelu=True)
    return F.linear(hidden, w2, b2)


def bare_products(x, w1, b1, w2, b2):
    return F.linear(F.linear(x, w1), w2)


def bare_gated_products(x, w_gate, w_up, w_down):
    return F.linear(F.linear(x, w_gate) + F.linear(x, w_up), w_down)


def liger_gated(x, w_gate, w_up, w_down):
    from liger_kernel.transformers.functional import liger_swiglu

    return F.linear(liger_swiglu(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


@needs_gpu
@lenient
@pytest.mark.parametrize("direction", ["forward", "forward_backward", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def bench_ffn_gpu(compare, smoke, op, shape, dtype, direction):
    if smoke and shape != GPU_SHAPES[2]:
        pytest.skip("not in a smoke run")
    rows, features, hidden = shape
    train = direction != "forward"

    def leaf(*sizes, scale=1.0):
        return random(*sizes, dtype=dtype, scale=scale).to(DEVICE).requires_grad_(train)

    x = leaf(rows, features)
    up, down = (hidden, features), (features, hidden)
    if op == "ffn":
        names, products = ("w1", "b1", "w2", "b2"), 2
        rest = (
            leaf(*up, scale=features**-0.5), leaf(hidden),
            leaf(*down, scale=hidden**-0.5), leaf(features),
        )  # fmt: skip
        activation, eager, bare = "gelu_tanh", eager_gelu_tanh, bare_products
        peers = {
            "eager": eager,
            "compile": compiled(eager, MODE),
            "cublaslt": cublas_epilogue,
        }
    else:
        names, products = ("w_gate", "w_up", "w_down"), 3
        rest = (
            leaf(*up, scale=features**-0.5), leaf(*up, scale=features**-0.5),
            leaf(*down, scale=hidden**-0.5),
        )  # fmt: skip
        activation, eager, bare = "silu", eager_gated, bare_gated_products
        peers = {
            "eager": eager,
            "compile": compiled(eager, MODE),
            "liger": liger_gated,
        }
    options = {"activation": activation, "recompute": direction == "recompute", "impl": "triton"}
    function = getattr(ops, op)

    def ours(x, *rest):
        return function(x, **dict(zip(names, rest, strict=True)), **options)

    leaves, d_out = [x, *rest], torch.ones_like(x)

    def runner(f):
        def run():
            out = f(x, *rest)
            if train:
                torch.autograd.grad(out, leaves, d_out, allow_unused=True)

        return run

    def check():
        few = {"x": x[:16].detach().requires_grad_(train), **dict(zip(names, rest, strict=True))}
        assert_within_budget(
            function,
            getattr(reference, op),
            few,
            {n: o for n, o in options.items() if n != "impl"},
            impl="triton",
            reduction=2 * hidden,
        )

    compare(
        runner(ours),
        {name: runner(peer) for name, peer in peers.items()},
        check=check,
        baselines={"products by cuBLAS": runner(bare)},
        flops=(3 if train else 1) * 2 * products * rows * features * hidden,
        bytes=products * features * hidden * x.element_size(),
        dtype=dtype,
        rounds=20,
        device=DEVICE,
    )
