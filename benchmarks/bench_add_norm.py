"""add_norm and dropout: what memory bandwidth decides.

On a GPU add_norm stands beside eager PyTorch, torch.compile and, where it is installed and has the
case, Liger-Kernel. Its gradients arrive at both results, as in a pre-norm block. Counted are the
bytes that have to move: forward reads x and residual and writes norm and total; backward reads
total and the gradients of both results and writes one gradient, two where dropout tells them apart.
"""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

from .cuda import compiled
from .marks import lenient, needs_gpu

SHAPES = [(128, 128), (1024, 256), (1024, 768), (2048, 4096)]  # rows, features
GPU_SHAPES = [
    (65536, 64),
    (65536, 256),
    (32768, 768),
    (16384, 1024),
    (8192, 4096),
    (8192, 8192),
    (4096, 16384),
    (2048, 65536),
]
DEVICE = "cuda"
ROUNDS = 20


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_add_norm(compare, step, smoke, shape, dtype, dropout_p):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    grad = {"dtype": dtype, "requires_grad": True}
    tensors = {
        "x": random(*shape, **grad),
        "residual": random(*shape, **grad),
        "weight": random(shape[1], **grad),
        "bias": random(shape[1], **grad),
    }
    values = tuple(tensors.values())

    def eager(x, residual, weight, bias):
        return F.layer_norm(residual + F.dropout(x, dropout_p), shape[1:], weight, bias)

    def check():
        assert_within_budget(
            ops.add_norm,
            reference.add_norm,
            tensors,
            {"dropout_p": dropout_p},
            impl="auto",
            reduction=max(shape),
        )

    compare(
        step(lambda *t: ops.add_norm(*t, dropout_p=dropout_p), *values),
        {"eager": step(eager, *values)},
        check=check,
        # forward: read x and residual, write both results; backward: read two, write two
        bytes=8 * values[0].nbytes,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_dropout(compare, smoke, shape, dtype):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    x = random(*shape, dtype=dtype)

    def check():
        assert_within_budget(
            ops.dropout, reference.dropout, {"x": x}, {"p": 0.1}, impl="auto", reduction=1
        )

    compare(
        lambda: ops.dropout(x, 0.1),
        {"eager": lambda: F.dropout(x, 0.1)},
        check=check,
        bytes=2 * x.nbytes,
        dtype=dtype,
    )


def eager_add_norm(x, residual, weight, bias, kind, dropout_p):
    """(norm, total) by operators of PyTorch."""
    total = residual + F.dropout(x, dropout_p)
    if kind == "layer":
        return F.layer_norm(total, total.shape[-1:], weight, bias), total
    return F.rms_norm(total, total.shape[-1:], weight, 1e-5), total


def liger_add_norm(x, residual, weight, bias, kind, dropout_p):
    """(norm, total) by Liger-Kernel, which has no dropout here and fuses the sum for RMSNorm."""
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_layer_norm

    assert dropout_p == 0.0, "Liger-Kernel has no dropout before its norms"
    if kind == "rms":
        return liger_fused_add_rms_norm(x, residual, weight, 1e-5)
    total = residual + x
    return liger_layer_norm(total, weight, bias, 1e-5), total


@needs_gpu
@lenient
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def bench_add_norm_gpu(compare, smoke, shape, dtype, kind, dropout_p, direction):
    if smoke and shape != GPU_SHAPES[0]:
        pytest.skip("not in a smoke run")
    train = direction == "forward_backward"
    x, residual = (random(*shape, dtype=dtype).to(DEVICE).requires_grad_(train) for _ in range(2))
    names = ("weight", "bias") if kind == "layer" else ("weight",)
    vectors = {n: random(shape[1], dtype=dtype).to(DEVICE).requires_grad_(train) for n in names}
    tensors = {"x": x, "residual": residual, "weight": None, "bias": None} | vectors
    leaves = [x, residual, *vectors.values()]
    directions = [torch.ones_like(x) for _ in range(2)]

    def ours(x, residual, weight, bias, kind, dropout_p):
        return ops.add_norm(
            x, residual, weight, bias, kind=kind, dropout_p=dropout_p, impl="triton"
        )

    def runner(function):
        def run():
            outputs = function(*tensors.values(), kind, dropout_p)
            if train:
                torch.autograd.grad(outputs, leaves, directions)

        return run

    def check():
        few = {n: None if t is None else t.detach() for n, t in tensors.items()}
        few |= {n: few[n][:64] for n in ("x", "residual")}
        few = {n: None if t is None else t.requires_grad_(train) for n, t in few.items()}
        assert_within_budget(
            ops.add_norm,
            reference.add_norm,
            few,
            {"kind": kind, "dropout_p": dropout_p},
            impl="triton",
            reduction=shape[1],
        )

    peers = {"eager": eager_add_norm, "compile": compiled(eager_add_norm), "liger": liger_add_norm}
    moved = 4 + (0 if not train else 5 if dropout_p else 4)
    compare(
        runner(ours),
        {name: runner(peer) for name, peer in peers.items()},
        check=check,
        bytes=moved * x.nbytes,
        dtype=dtype,
        rounds=ROUNDS,
        device=DEVICE,
    )


@needs_gpu
@lenient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def bench_dropout_gpu(compare, smoke, shape, dtype):
    if smoke and shape != GPU_SHAPES[0]:
        pytest.skip("not in a smoke run")
    x, residual = (random(*shape, dtype=dtype).to(DEVICE) for _ in range(2))

    def eager(x, residual):
        return residual + F.dropout(x, 0.1)

    def check():
        few = {"x": x[:64], "residual": residual[:64]}
        assert_within_budget(
            ops.dropout, reference.dropout, few, {"p": 0.1}, impl="triton", reduction=1
        )

    inductor = torch.compile(eager, dynamic=False)
    compare(
        lambda: ops.dropout(x, 0.1, residual, impl="triton"),
        {"eager": lambda: eager(x, residual), "compile": lambda: inductor(x, residual)},
        check=check,
        bytes=3 * x.nbytes,
        dtype=dtype,
        rounds=ROUNDS,
        device=DEVICE,
    )
