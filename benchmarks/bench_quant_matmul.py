"""quant_matmul beside every installed engine that has such a product (see quant_peers.py).

For up to 16 rows all engines go through copies of their weight, so that it comes from memory; for
more, where arithmetic decides, they keep one. Errors are relative to the fp32 product with the
weight as it was before it was quantized, in the Frobenius norm. Ours is captured (``eager``: the
same calls from Python), as other engines prepare a graph. A table of all ends the run.

    pip install -e ".[bench,peers]"
    OMP_PROC_BIND=close OMP_PLACES=threads pytest benchmarks/ --benchmark-only -k quant

On a GPU (``-k quant_matmul_gpu``): bf16 activations beside cuBLAS with the bf16 weight and torch's
own kernels; weights come from memory, as the L2 cache is overwritten before each call. The time of
fp8 includes the rounding of activations, everybody's.
"""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import explain, ops, quantize, reference
from llmos_fast.quantize import FP8, format_of, interleave, rounds_activations
from llmos_fast.testing import assert_close_to_truth, assert_within_budget, random

from . import quant_gpu_peers
from .marks import lenient, needs_gpu
from .quant_peers import Engines

ROWS = [1, 4, 16, 64, 512]
COLD_ROWS = 16
SMOKE_ROWS = [1, 16, 512]
SMALLEST = (64, 128)  # in_features, out_features
SHAPES = [SMALLEST, (768, 3072), (3072, 768), (2048, 5632), (4096, 4096), (4096, 11008)]
EVERYWHERE = [("int8", 128), ("int4", 32), ("int4", 128)]  # scheme, group
ONCE = [("int4_asym", 32), ("int4_a16", 32), ("nf4", 64), ("int8_a16", 128)]
CASES = [
    (scheme, group, shape)
    for scheme, group in EVERYWHERE + ONCE
    for shape in SHAPES
    if (scheme, group) in EVERYWHERE or shape in (SMALLEST, (2048, 5632))
]


def named(case):
    scheme, group, (features, out_features) = case
    groups = "" if scheme.startswith("int8") else f"-g{group}"
    return f"{scheme}{groups}-{features}x{out_features}"


@pytest.fixture(scope="module")
def prepared():
    """``prepared(case, cold)``: what was made last is kept for other rows, or goes before more."""
    last = {}

    def prepare(case, cold):
        if (case, cold) not in last:
            last.clear()
            scheme, group, (features, out_features) = case
            weight = random(out_features, features, scale=0.02)
            quantized = quantize(weight, scheme, group)
            last[case, cold] = weight, quantized, Engines(weight, quantized, group, cold)
        return last[case, cold]

    return prepare


@pytest.mark.filterwarnings("ignore")  # peers may warn about themselves
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=named)
@torch.no_grad()
def bench_quant_matmul(benchmark, compare, smoke, prepared, case, rows):
    scheme, _, (features, out_features) = case
    if smoke != ((features, out_features) == SMALLEST) or (smoke and rows not in SMOKE_ROWS):
        pytest.skip("the smallest weight is for smoke runs, and they are for it")
    weight, quantized, engines = prepared(case, rows <= COLD_ROWS and not smoke)
    x = random(rows, features)
    runs = engines.bind(x)
    exact = F.linear(x, weight)

    def check():
        some = slice(None, None, max(1, rows // 16))
        truth = reference.quant_matmul(x[some].double(), quantized)
        eager = reference.quant_matmul(x[some], quantized)
        out = ops.quant_matmul(x, quantized, impl="native")[some]
        assert_close_to_truth(out, eager, truth, reduction=features)

    compare(
        runs["ours"],
        {name: run for name, run in runs.items() if name not in ("ours", "eager")},
        baselines={"eager": runs["eager"]},
        check=check,
        flops=2 * rows * features * out_features,
        bytes=quantized.nbytes,
        dtype=torch.int8 if rounds_activations(scheme) else torch.float32,
        rounds=20 if rows <= COLD_ROWS else 7,
        calls=engines.copies,
    )
    benchmark.extra_info.update(
        case=named(case),
        rows=rows,
        relative_error={
            name: ((run().float() - exact).norm() / exact.norm()).item()
            for name, run in runs.items()
        },
        left_out=engines.left_out,
    )


GPU_ROWS = [1, 4, 16, 32, 64, 128, 256, 4096]
GPU_SHAPES = [(4096, 4096), (8192, 8192), (16384, 8192), (4096, 28672)]  # in, out
GPU_SCHEMES = [("int4_a16", 128), ("int4_a16", 32), ("int4_asym_a16", 128), ("nf4", 64)]
GPU_SCHEMES += [(scheme, 128) for scheme in ("int8_a16", "int8", "int4", "int4_asym")]
GPU_SCHEMES += [(scheme, 128) for scheme in ("fp8", "fp8_block", "fp8_a16")]


def multiplied_dtype(scheme: str) -> torch.dtype:
    """What the tensor cores read."""
    if not rounds_activations(scheme):
        return torch.bfloat16
    return torch.float8_e4m3fn if format_of(scheme) in FP8 else torch.int8


@needs_gpu
@lenient
@pytest.mark.parametrize("rows", GPU_ROWS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize(("scheme", "group"), GPU_SCHEMES)
@pytest.mark.parametrize("impl", ["native", "triton"])
@torch.no_grad()
def bench_quant_matmul_gpu(compare, smoke, impl, scheme, group, shape, rows):
    if smoke and (shape, rows) != (GPU_SHAPES[0], 16):
        pytest.skip("not in a smoke run")
    features, out_features = shape
    weight = random(out_features, features, scale=0.02).to("cuda", torch.bfloat16)
    quantized = quantize(weight, scheme, group)
    x = random(rows, features, dtype=torch.bfloat16).to("cuda")
    if reason := dict(explain(ops.quant_matmul, x, quantized))[impl]:
        pytest.skip(reason)

    def check():
        assert_within_budget(
            ops.quant_matmul,
            reference.quant_matmul,
            {"x": x[:128]},
            {"qweight": quantized},
            impl=impl,
            reduction=features,
        )

    peers = quant_gpu_peers.prepared(scheme, weight, group)
    compare(
        lambda: ops.quant_matmul(x, quantized, impl=impl),
        {name: lambda f=f: f(x) for name, f in peers.items()},
        check=check,
        flops=2 * rows * features * out_features,
        bytes=quantized.nbytes,
        dtype=multiplied_dtype(scheme),
        rounds=50,
        device="cuda",
    )


GATED_SHAPES = [(4096, 14336), (8192, 28672)]  # in, out of both


@needs_gpu
@lenient
@pytest.mark.parametrize("rows", GPU_ROWS)
@pytest.mark.parametrize("shape", GATED_SHAPES, ids=str)
@pytest.mark.parametrize("scheme", ["fp8", "fp8_block"])
@torch.no_grad()
def bench_quant_matmul_gated_gpu(compare, smoke, scheme, shape, rows):
    """A SwiGLU pair in one launch, beside two products and torch's multiplication."""
    if smoke and (shape, rows) != (GATED_SHAPES[0], 16):
        pytest.skip("not in a smoke run")
    features, out_features = shape
    gate, up = (
        quantize(random(out_features, features, scale=0.02).to("cuda"), scheme) for _ in range(2)
    )
    pair, options = interleave(gate, up), {"activation": "silu", "gated": True}
    x = random(rows, features, dtype=torch.bfloat16).to("cuda")
    if reason := dict(explain(ops.quant_matmul, x, pair, **options))["triton"]:
        pytest.skip(reason)

    def check():
        assert_within_budget(
            ops.quant_matmul,
            reference.quant_matmul,
            {"x": x[:128]},
            {"qweight": pair, **options},
            impl="triton",
            reduction=features,
        )

    def two_products():
        return ops.quant_matmul(x, gate, activation="silu") * ops.quant_matmul(x, up)

    compare(
        lambda: ops.quant_matmul(x, pair, **options, impl="triton"),
        {},
        baselines={"two_products": two_products},
        check=check,
        flops=4 * rows * features * out_features,
        bytes=pair.nbytes,
        dtype=multiplied_dtype(scheme),
        rounds=50,
        device="cuda",
    )
