"""Timing on a GPU: CUDA events, a cold L2 cache, everybody in turn.

Before each timed call the L2 cache is overwritten. Then the GPU is kept busy until the host has
enqueued the whole call: the events enclose what the device does, without the gaps that a slow host
leaves between launches. What the host needs for a call is a number of its own.

Nothing here touches the card's settings: clocks and power are read and reported as they are.
"""

from __future__ import annotations

import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

Run = Callable[[], Any]

# cycles in a second of a GPU faster than any: a wait is never shorter than asked
_MAX_CLOCK = 2.5e9
# characters of a peer's reason: some list every backend that torch has
_REASON = 300
_QUERIES = ("clocks.sm", "power.draw", "temperature.gpu")


class Samples(NamedTuple):
    """Seconds of each round, between the events on the device and of the host that launches."""

    device: list[float]
    host: list[float]


def measure(runs: Mapping[str, Run], rounds: int) -> dict[str, Samples]:
    """Time every run once in each round, in an order that turns round every time."""
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device="cuda")
    cycles = {name: int(_launch_seconds(run) * _MAX_CLOCK) for name, run in runs.items()}
    samples = {name: Samples([], []) for name in runs}
    for number in range(rounds):
        events = {}
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(cycles[name])
            start.record()
            begin = time.perf_counter()
            runs[name]()
            samples[name].host.append(time.perf_counter() - begin)
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].device.append(start.elapsed_time(end) / 1e3)
    return samples


def _launch_seconds(run: Run) -> float:
    """Time that is enough for the host to launch ``run``, which is warm afterwards."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 2 * seconds + 1e-4


def refusal(run: Run) -> str | None:
    """Why a peer does not take a case, in its own words; None where it ran.

    torch tells in warnings why a forced SDPA backend will not do, and in the error that none did.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:  # other people's code: they all raise something else
            told = [*(str(w.message) for w in caught), f"{type(error).__name__}: {error}"]
            return "; ".join(dict.fromkeys(" ".join(t.split())[:_REASON] for t in told))
    return None


@cache
def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """``function`` by Inductor, for the shapes it meets; once, whoever asks."""
    return torch.compile(function, dynamic=False, mode=mode)


def state() -> dict[str, float]:
    """SM clock in MHz, power in W and temperature in C at this moment; {} without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    answer = subprocess.run(
        [
            "nvidia-smi",
            f"--id=GPU-{torch.cuda.get_device_properties().uuid}",
            f"--query-gpu={','.join(_QUERIES)}",
            "--format=csv,noheader,nounits",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    values = answer.stdout.strip().split(", ")
    if answer.returncode != 0 or len(values) != len(_QUERIES):
        return {}
    # a card that does not tell answers "[N/A]"
    numbers = zip(_QUERIES, values, strict=True)
    return {name: float(value) for name, value in numbers if value[:1].isdigit()}


def limits(smoke: bool) -> tuple[float, dict[torch.dtype, float]]:
    """(bytes/s of a large copy, read and written; FLOP/s of a large product, by dtype).

    fp32 stands for the precision of fp32: three products in tf32. 8 bits are twice as fast as 16 by
    the data sheets of the A100 and the H200; no library here comes near that in int8.
    """
    size, side = (2**24, 512) if smoke else (2**31, 8192)
    source = torch.empty(size, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    runs: dict[Any, Run] = {"copy": lambda: target.copy_(source)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
        runs[dtype] = lambda a=a, b=b: a @ b
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    seconds = {name: sorted(s.device)[len(s.device) // 2] for name, s in measure(runs, 9).items()}
    torch.set_float32_matmul_precision(previous)
    peak = {name: 2 * side**3 / seconds[name] for name in runs if name != "copy"}
    peak[torch.float32] /= 3
    peak[torch.int8] = peak[torch.float8_e4m3fn] = 2 * peak[torch.bfloat16]
    return 2 * size / seconds["copy"], peak
