"""The routed product and the loss beside torch's own."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import capture, ops, reference
from llmos_fast.testing import assert_within_budget, random

SHAPES = [(32, 128, 512), (1, 768, 3072), (256, 768, 3072), (1024, 768, 3072), (1024, 3072, 768)]


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_linear(compare, step, smoke, shape, dtype, direction):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    rows, features, out = shape
    train = direction == "forward_backward"
    grad = {"dtype": dtype, "requires_grad": train}
    tensors = {
        "x": random(rows, features, **grad),
        "weight": random(out, features, **grad),
        "bias": random(out, **grad),
    }
    values = tuple(tensors.values())

    def check():
        few = tensors | {"x": tensors["x"][:16].detach().requires_grad_(train)}
        assert_within_budget(
            ops.linear, reference.linear, few, impl="auto", reduction=max(features, out)
        )

    def runner(function):
        return step(function, *values) if train else lambda: function(*values)

    compare(
        runner(ops.linear),
        {"eager": runner(F.linear)},
        check=check,
        flops=(3 if train else 1) * 2 * rows * features * out,
        bytes=values[1].nbytes,
        dtype=dtype,
    )


FEW_ROWS = [(64, 128), (768, 768), (768, 3072), (3072, 768), (2048, 5632), (5632, 2048)]
FEW_ROWS += [(768, 50257), (2048, 32000)]  # in_features, out_features
TOUCHED = 96 * 2**20  # bytes of weights in a run: three times a last-level cache of 32 MiB


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", FEW_ROWS, ids=str)
@torch.no_grad()
def bench_few_rows(compare, smoke, shape, dtype, rows):
    """Decoding: weights come from memory, because a run goes through copies of them.

    Ours is captured; ``calls``: the same from Python.
    """
    if smoke != (shape == FEW_ROWS[0]):
        pytest.skip("the smallest weight is for smoke runs, and they are for it")
    features, out = shape
    x, weight = random(rows, features, dtype=dtype), random(out, features, dtype=dtype)
    copies = 1 if smoke else math.ceil(TOUCHED / weight.nbytes)
    weights = [weight.clone() for _ in range(copies)]

    def check():
        assert_within_budget(
            ops.linear,
            reference.linear,
            {"x": x, "weight": weight},
            impl="native",
            reduction=features,
        )

    def all_of(function):
        return lambda: [function(x, w) for w in weights]

    peers = {"eager": all_of(F.linear)}
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        peers["onednn"] = all_of(lambda x, w: onednn(x, w, None, "none", [], ""))
    compare(
        capture(all_of(ops.linear)).replay,
        peers,
        baselines={"calls": all_of(ops.linear)},
        check=check,
        flops=copies * 2 * rows * features * out,
        bytes=copies * weight.nbytes,
        dtype=dtype,
    )


@pytest.mark.parametrize("shape", [(64, 1000, 64), (700, 33278, 200), (1024, 50257, 768)], ids=str)
def bench_linear_cross_entropy(compare, step, smoke, shape):
    rows, classes, features = shape
    if smoke and rows != 64:
        pytest.skip("not in a smoke run")
    tensors = {
        "hidden": random(rows, features, requires_grad=True),
        "weight": random(classes, features, scale=0.05, requires_grad=True),
        "target": torch.randint(0, classes, (rows,)),
    }
    values = tuple(tensors.values())

    def check():
        few = tensors | {
            "hidden": tensors["hidden"][:16].detach().requires_grad_(),
            "target": tensors["target"][:16],
        }
        assert_within_budget(
            ops.linear_cross_entropy,
            reference.linear_cross_entropy,
            few,
            impl="auto",
            reduction=classes,
        )

    def eager(hidden, weight, target):
        return F.cross_entropy(F.linear(hidden, weight), target)

    compare(
        step(ops.linear_cross_entropy, *values),
        {"eager": step(eager, *values)},
        check=check,
        flops=3 * 2 * rows * classes * features,
        bytes=2 * values[1].nbytes,
        rounds=5,
    )


_PEAK = """
import json, resource, sys, time
import torch
import torch.nn.functional as F
from llmos_fast import ops
rows, classes, features = json.loads(sys.argv[2])
hidden = torch.randn(rows, features, requires_grad=True)
weight = torch.randn(classes, features).mul_(0.05).requires_grad_()
target = torch.randint(0, classes, (rows,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
if sys.argv[1] == "llmos_fast":
    loss = ops.linear_cross_entropy(hidden, weight, target)
else:
    loss = F.cross_entropy(F.linear(hidden, weight), target)
loss.backward()
seconds = time.perf_counter() - start
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"peak": peak, "seconds": seconds, "loss": loss.item()}))
"""


def loss_in_a_fresh_process(library, shape):
    """Bytes by which one loss and its gradients raise the peak of a process, and its time."""
    command = [sys.executable, "-c", _PEAK, library, json.dumps(shape)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("shape", [(256, 5000, 64), (8192, 50257, 768)], ids=str)
def bench_loss_peak_memory(benchmark, smoke, shape):
    if smoke and shape[0] != 256:
        pytest.skip("not in a smoke run")
    ours = benchmark.pedantic(loss_in_a_fresh_process, args=("llmos_fast", shape), rounds=1)
    theirs = loss_in_a_fresh_process("torch", shape)
    assert abs(ours["loss"] - theirs["loss"]) < 1.0  # other random numbers, the same distribution
    benchmark.extra_info.update(
        peak_mib=ours["peak"] / 2**20,
        peers_peak_mib={"torch": theirs["peak"] / 2**20},
        ratio=ours["peak"] / max(theirs["peak"], 1),
        seconds={"ours": ours["seconds"], "torch": theirs["seconds"]},
    )
