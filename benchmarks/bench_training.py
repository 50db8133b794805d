"""Training steps of GPT-2's architecture beside torch.nn, eager and compiled.

bench_gpt2_step:        GPT-2 small. ``compile_s`` in ``extra_info`` is the first compiled
                        step.
bench_training_scaling: 4096 tokens a step in sequences of 64 to 2048, and sequences of 256 in
                        batches of 1 to 16; ``plot_scaling.py`` draws the cost of a token from it.
bench_training_threads: the same step on one thread and on two.
bench_gpt2_peak_memory: of a fresh process that makes three steps.

    OMP_PROC_BIND=close OMP_PLACES=threads pytest benchmarks/bench_training.py --benchmark-only
"""

import time

import pytest
import torch

from .memory_training import compare_peaks
from .training_models import (
    GPT2_SMALL,
    OurGPT,
    Shape,
    TorchGPT,
    check_same_losses,
    training_step,
)

SMOKE = Shape(64, 4, 2, 32, 2, 500)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def compiled():
    """``torch.compile``, for as long as a case runs."""
    yield torch.compile
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def bench_gpt2_step(benchmark, compare, compiled, smoke, dropout, precision):
    shape = SMOKE if smoke else GPT2_SMALL
    dtype = PRECISIONS[precision]
    options = {"dropout": dropout, "autocast": dtype == torch.bfloat16}
    peers = {"torch.nn": training_step(TorchGPT, shape, **options)}
    if not smoke:  # compiling takes longer than a smoke run may
        peers["torch.compile"] = training_step(TorchGPT, shape, **options, wrap=compiled)
        started = time.perf_counter()
        peers["torch.compile"]()
        benchmark.extra_info["compile_s"] = time.perf_counter() - started
    compare(
        training_step(OurGPT, shape, **options),
        peers,
        check=lambda: check_same_losses(shape),
        flops=shape.step_flops,
        dtype=dtype,
        rounds=3,
    )


def compare_steps(benchmark, compare, shape, precision, along):
    """Ours and torch.nn's at dropout 0.1; ``scaling`` in ``extra_info`` is what a plot needs."""
    dtype = PRECISIONS[precision]
    options = {"dropout": 0.1, "autocast": dtype == torch.bfloat16}
    compare(
        training_step(OurGPT, shape, **options),
        {"torch.nn": training_step(TorchGPT, shape, **options)},
        check=lambda: check_same_losses(shape),
        flops=shape.step_flops,
        dtype=dtype,
        rounds=5,
    )
    threads = torch.get_num_threads()
    benchmark.extra_info["scaling"] = {"along": along, "threads": threads, **shape._asdict()}


def small_gpt(seq, batch):
    return Shape(256, 4, 4, seq, batch, 1000)


TOKENS = 4096
ALONG_SEQ = [("seq", seq, TOKENS // seq) for seq in (64, 128, 256, 512, 1024, 2048)]
ALONG_BATCH = [("batch", 256, batch) for batch in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("along", "seq", "batch"), ALONG_SEQ + ALONG_BATCH)
def bench_training_scaling(benchmark, compare, smoke, along, seq, batch, precision):
    if smoke and (along, seq) != ("seq", 64):
        pytest.skip("not in a smoke run")
    shape = small_gpt(seq, 1 if smoke else batch)
    compare_steps(benchmark, compare, shape, precision, along)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    if request.param > before:
        pytest.skip(f"{before} threads here")
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", PRECISIONS)
def bench_training_threads(benchmark, compare, roofline, threads, smoke, precision):
    """The limit is that of all threads, which ``roofline`` has measured before."""
    shape = small_gpt(64, 1) if smoke else small_gpt(256, 8)
    compare_steps(benchmark, compare, shape, precision, "threads")


def bench_gpt2_peak_memory(benchmark, smoke):
    shape = SMOKE if smoke else GPT2_SMALL
    compare_peaks(benchmark, "benchmarks.training_models", shape)
