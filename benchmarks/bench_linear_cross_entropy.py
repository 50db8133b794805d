"""The loss of a language model from its last hidden layer: time, and the memory that it takes.

On a GPU beside eager PyTorch, torch.compile and, where it is installed, Liger-Kernel. Arithmetic is
counted as the three products that a loss and its gradients need, forward alone as one: what an
implementation computes twice is its own affair.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, random

from .cuda import compiled
from .marks import lenient, needs_gpu

# rows, classes, features: a small and a large language model
SHAPES = [(8192, 50257, 768), (4096, 128256, 4096)]
SMALL = (64, 1000, 64)
DEVICE = "cuda"
ROUNDS = 20


def eager_loss(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target)


def liger_loss(hidden, weight, target):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)


def make_call(shape, dtype, train, device="cpu"):
    """hidden, weight and target."""
    rows, classes, features = shape
    hidden = random(rows, features, dtype=dtype).to(device).requires_grad_(train)
    weight = random(classes, features, dtype=dtype, scale=features**-0.5)
    target = torch.randint(0, classes, (rows,), device=device)
    return hidden, weight.to(device).requires_grad_(train), target


def check_few_rows(call, train, impl, **options):
    hidden, weight, target = call
    few = {
        "hidden": hidden[:64].detach().requires_grad_(train),
        "weight": weight,
        "target": target[:64],
    }
    op, definition = ops.linear_cross_entropy, reference.linear_cross_entropy
    assert_within_budget(op, definition, few, options, impl=impl, reduction=weight.shape[0])


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def bench_cross_entropy(compare, step, softcap):
    """A small vocabulary on the CPU; bench_linear.py has the large ones."""
    call = make_call(SMALL, torch.float32, True)
    options = {"softcap": softcap, "label_smoothing": 0.1}

    def eager(hidden, weight, target):
        logits = F.linear(hidden, weight)
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, target, label_smoothing=0.1)

    compare(
        step(partial(ops.linear_cross_entropy, **options), *call),
        {"eager": step(eager, *call)},
        check=lambda: check_few_rows(call, True, "auto", **options),
        flops=3 * 2 * SMALL[0] * SMALL[1] * SMALL[2],
        bytes=2 * call[1].nbytes,
    )


@needs_gpu
@lenient
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_cross_entropy_gpu(compare, step, smoke, shape, dtype, direction):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    train = direction == "forward_backward"
    call = make_call(shape, dtype, train, DEVICE)
    rows, classes, features = shape

    def runner(function):
        return step(function, *call) if train else lambda: function(*call)

    compare(
        runner(partial(ops.linear_cross_entropy, impl="triton")),
        {
            "eager": runner(eager_loss),
            "compile": runner(compiled(eager_loss)),
            "liger": runner(liger_loss),
        },
        check=lambda: check_few_rows(call, train, "triton"),
        flops=(3 if train else 1) * 2 * rows * classes * features,
        bytes=call[1].nbytes,
        dtype=dtype,
        rounds=ROUNDS,
        device=DEVICE,
    )


def peak_bytes(run):
    """What ``run`` takes beside what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@needs_gpu
@lenient
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_cross_entropy_memory_gpu(benchmark, step, smoke, shape):
    """The gradients, which every library has to return, included."""
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    call = make_call(shape, torch.bfloat16, True, DEVICE)
    ours = step(partial(ops.linear_cross_entropy, impl="triton"), *call)
    peak = benchmark.pedantic(peak_bytes, args=(ours,), rounds=1)
    theirs = peak_bytes(step(eager_loss, *call))
    benchmark.extra_info.update(
        peak_mib=peak / 2**20, peers_peak_mib={"eager": theirs / 2**20}, ratio=peak / theirs
    )
