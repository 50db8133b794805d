"""How everything here is measured: the machine's limits first, then ours and every peer in turn.

A benchmark times ours with pytest-benchmark; before each of its rounds every peer runs once and is
timed too, so that all of them see the same machine. On a GPU all of them are timed by CUDA events
(see cuda.py) and pytest-benchmark is told what these say. It starts by comparing the result with
the reference and reports nothing when that fails. Figures of the peers, ratios, rates and the share
of the machine's limit go to ``extra_info`` of the JSON.

    pytest benchmarks/ --benchmark-only --benchmark-json=out.json
    python -m benchmarks.report out.json

With ``--benchmark-disable`` everything is checked and run once, and nothing is timed: on a GPU,
``-n 6 --benchmark-disable`` (pytest-xdist) compiles the kernels of all on every core beforehand.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from llmos_fast.info import machine, versions

from . import cuda, report
from .cuda import Run


class Roofline(NamedTuple):
    """What the machine reached just now, on all threads: GB/s, and FLOP/s by dtype."""

    bandwidth: float
    peak: dict[torch.dtype, float]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="one round of the smallest shapes only")


@pytest.fixture(scope="session")
def smoke(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--smoke"))


def best_time(run: Run, rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture(scope="session")
def roofline(smoke: bool) -> Roofline:
    """Bandwidth: the fastest of three reductions of 256 MiB, each at times as fast as a plain loop
    of vector loads; peak: the best large product of any library here, and for int8 what the
    extension measures, where it does.
    """
    size = 2**22 if smoke else 2**26
    data = torch.ones(size)
    reads: list[Run] = [data.sum, data.amax, partial(torch.dot, data, data)]
    bandwidth = data.nbytes / min(best_time(read, 7) for read in reads)
    side = 256 if smoke else 2048
    peak = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
        runs: list[Run] = [lambda a=a, b=b: a @ b]
        if dtype == torch.float32 and torch.backends.mkldnn.is_available():
            linear = torch.ops.mkldnn._linear_pointwise
            runs.append(partial(linear, a, b, None, "none", [], ""))
        peak[dtype] = 2 * side**3 / min(best_time(run, 5) for run in runs)
    with suppress(ImportError):  # an installation without a compiler has no kernels of its own
        from llmos_fast._C import int8_peak

        peak[torch.int8] = max(int8_peak() for _ in range(5))
    return Roofline(bandwidth, peak)


@pytest.fixture(scope="session")
def gpu_roofline(smoke: bool) -> Roofline:
    """Of the GPU: bytes read and written by a large copy, and large products of torch's own."""
    return Roofline(*cuda.limits(smoke))


Timed = tuple[dict[str, float], dict[str, Any]]


def _time_on_cpu(benchmark: Any, ours: Run, others: dict[str, Run], rounds: int) -> Timed:
    """Median seconds of the others, and nothing more to tell; ``benchmark`` has ours."""
    times: dict[str, list[float]] = {name: [] for name in others}
    for other in others.values():
        other()

    def run_others() -> None:
        for name, other in others.items():
            start = time.perf_counter()
            other()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=run_others, rounds=rounds, warmup_rounds=int(rounds > 1))
    return {name: statistics.median(samples) for name, samples in times.items()}, {}


def _time_bursts(
    benchmark: Any, ours: Run, others: dict[str, Run], rounds: int, calls: dict[str, int]
) -> Timed:
    """Medians where engines have threads of their own, which wait for more work in busy loops.

    These end within 11 ms (measured); so every run comes after a pause. A run that is one call is
    preceded by another one, which wakes the threads; among several calls the wake-up is lost.
    """
    runs = {"ours": ours} | others
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _, (name, run) in itertools.product(range(rounds), runs.items()):
        time.sleep(0.02)
        if calls[name] == 1:
            run()
        start = time.perf_counter()
        run()
        samples[name].append((time.perf_counter() - start) / calls[name])
    _tell(benchmark, samples["ours"])
    return {name: statistics.median(samples[name]) for name in others}, {"calls": calls}


def _tell(benchmark: Any, seconds: list[float]) -> None:
    """Give pytest-benchmark what was measured elsewhere, as one round for each number."""
    readings = itertools.chain.from_iterable((0.0, taken) for taken in seconds)

    def measured() -> float:
        return next(readings)

    benchmark._timer = measured
    benchmark.pedantic(lambda: None, rounds=len(seconds))


def _time_on_gpu(benchmark: Any, ours: Run, others: dict[str, Run], rounds: int) -> Timed:
    """Likewise by CUDA events; and what the host needs to launch, and the card's state."""
    torch.cuda.empty_cache()  # what the case before has left
    samples = cuda.measure({"ours": ours} | others, rounds)
    state = cuda.state()
    _tell(benchmark, samples["ours"].device)
    medians = {name: statistics.median(samples[name].device) for name in others}
    host = {name: 1e6 * statistics.median(taken.host) for name, taken in samples.items()}
    return medians, {"host_us": host, "state": state}


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest, smoke: bool) -> Callable[..., None]:
    """``compare(ours, peers, check=..., flops=..., bytes=..., dtype=...)`` measures and records.

    ours, peers: functions without arguments, the peers by name.
    check:       called once before anything is timed; raises where the result is wrong.
    flops:       arithmetic of one call, from the formula of the op; 0 where bytes decide.
    bytes:       what one call must at least move.
    device:      "cpu" or "cuda"; on a GPU a peer that does not take the case is left out, and
                 ``left_out`` tells why.
    baselines:   more of ours, timed in turn and reported apart: what the peers are not.
    calls:       by name ("ours" too) of how many calls a run consists, where engines with threads
                 of their own run in turn; the times are those of one call.
    """

    def measure(
        ours: Run,
        peers: dict[str, Run],
        *,
        check: Run,
        flops: float = 0,
        bytes: float = 0,
        dtype: torch.dtype = torch.float32,
        rounds: int = 15,
        device: str = "cpu",
        baselines: dict[str, Run] | None = None,
        calls: dict[str, int] | None = None,
    ) -> None:
        check()
        baselines = baselines or {}
        extra: dict[str, Any] = {}
        if device == "cuda":
            left_out = {name: reason for name, p in peers.items() if (reason := cuda.refusal(p))}
            peers = {name: peer for name, peer in peers.items() if name not in left_out}
            extra = {"device": device, "left_out": left_out}
        others = peers | baselines
        if not benchmark.enabled:
            benchmark(ours)
            for other in others.values():
                other()
            return
        roofline = request.getfixturevalue("gpu_roofline" if device == "cuda" else "roofline")
        time_all: Callable[..., Timed] = _time_on_gpu if device == "cuda" else _time_on_cpu
        if calls is not None:
            time_all = partial(_time_bursts, calls=calls)
        medians, taken = time_all(benchmark, ours, others, 1 if smoke else rounds)
        seconds = benchmark.stats.stats.median
        peak = roofline.peak.get(dtype)  # None: not measured, so only bytes count
        limit = max(flops / peak if peak else 0, bytes / roofline.bandwidth)
        benchmark.extra_info.update(
            peers_ms={name: 1e3 * medians[name] for name in peers},
            speedup={name: medians[name] / seconds for name in peers},
            tflops=flops / seconds / 1e12,
            gbps=bytes / seconds / 1e9,
            share_of_limit=limit / seconds,
            dtype=str(dtype).removeprefix("torch."),
            roofline={"gbps": roofline.bandwidth / 1e9, "tops": peak and peak / 1e12},
            **extra,
            **taken,
        )
        if baselines:
            benchmark.extra_info["baselines_ms"] = {n: 1e3 * medians[n] for n in baselines}

    return measure


@pytest.fixture
def step() -> Callable[..., Run]:
    """``step(function, *tensors)`` runs forward and backward and drops the gradients again."""

    def make(function: Callable[..., Any], *tensors: torch.Tensor) -> Run:
        leaves = [t for t in tensors if t.requires_grad]

        def run() -> None:
            out = function(*tensors)
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        return run

    return make


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["llmos_fast"] = versions() | machine()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keep medians, not every sample."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """All engines of the cases that have many, below pytest-benchmark's table of ours."""
    session = getattr(config, "_benchmarksession", None)
    entries = [
        {"extra_info": entry.extra_info, "stats": {"median": entry.stats.median}}
        for entry in (session.benchmarks if session else ())
        if not entry.has_error and entry.stats.data
    ]
    terminalreporter.write(report.engines(entries))
