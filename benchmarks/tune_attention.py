"""Put the launch tables of the attention kernels into the order that this GPU asks for.

Every launch that ``kernels/launch.py`` lists is compared with the reference first, and then timed
with the others of its entry, in turn and on a cold cache. Printed is Python source that replaces
entries of the tables: wrong launches are left out, and the last one fits every call, as the table
promises. Nothing is written but ``--json``.

    python -m benchmarks.tune_attention --minutes 9 --json tune.json

Comparing is mostly compiling: every entry has a process of its own, all at once, so that a launch
that breaks the GPU's context takes no other with it. What is not done in time is named.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llmos_fast.kernels import launch as launches
from llmos_fast.kernels.launch import Launch, Variant
from llmos_fast.kernels.runtime import architecture

from llmos_fast import ops, reference
from llmos_fast.info import machine, versions
from llmos_fast.testing import assert_within_budget, random

from . import attention_cases, cuda
from .attention_calls import call_of, check_last_rows
from .attention_cases import CHANNELS, DEVICE, TOKENS, Case

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# most asked for first: what time is left over is for the others
HEAD_DIMS = (128, 64, 256, 512)
BIAS = "attention_backward_bias"
ROUNDS = 10
# launches that differ by less keep their order: the spread of two runs of the same one
NOISE = 0.01

Ranked = list[tuple[Launch, dict[str, float]]]


class Key(NamedTuple):
    """An entry of the tables."""

    kernel: str
    size: int
    head_dim: int

    def listed(self) -> list[Launch]:
        """Its launches, each once."""
        device, dtype = torch.device(DEVICE), DTYPES[self.size]
        return list(dict.fromkeys(launches.candidates(self.kernel, device, dtype, self.head_dim)))

    def cases(self) -> dict[str, Case]:
        """What its launches are timed on, by name."""
        if self.kernel == BIAS:
            return {"bias": self._case(2048, causal=False, feature="bias")}
        return {
            "causal": self._case(4096, causal=True),
            "full": self._case(4096, causal=False),
            "alibi": self._case(4096, causal=True, feature="alibi"),
        }

    def _case(self, seq: int, causal: bool, feature: str = "plain") -> Case:
        heads = CHANNELS // self.head_dim
        shape = (TOKENS // seq, heads, heads, seq, self.head_dim, self.head_dim, causal)
        return Case(*shape, feature, DTYPES[self.size])


def takes(launch: Launch, case: Case) -> bool:
    """Specialised warps, and launches that are light, compute plain scores only."""
    return case.feature == "plain" or not (launch.WARP_SPECIALIZE or launch.light)


def universal(launch: Launch) -> bool:
    """Whether it fits every call, as the last one of an entry has to."""
    return not (launch.TMA or launch.WARP_SPECIALIZE or launch.light)


def run_of(key: Key, case: Case) -> cuda.Run:
    """A call in which ``key.kernel`` runs: forward, or the gradients alone."""
    train = key.kernel != "attention_forward"
    call, feature = call_of(case, train), attention_cases.make(case)
    leaves = [feature.ours["bias"].requires_grad_()] if key.kernel == BIAS else []

    def attend(query: torch.Tensor, *rest: torch.Tensor) -> Any:
        return ops.attention(query, *rest, causal=case.causal, impl="triton", **feature.ours)

    return call.backward_runner(attend, *leaves) if train else call.runner(attend)


def check(key: Key, launch: Launch) -> None:
    """Raise where the launch is wrong: on ragged sizes, and on what it is timed with."""
    dtype = DTYPES[key.size]
    for hides in (False, True):
        variant = Variant(key.kernel, launch, key.head_dim, dtype, hides)
        if not launches.usable(variant, torch.device(DEVICE)):
            raise ValueError("the self-test fails")
    with launches.forced(**{key.kernel: launch}):
        sizes = {"query": (2, 4, 200), "key": (2, 2, 264), "value": (2, 2, 264)}
        tensors = {n: random(*size, key.head_dim, dtype=dtype) for n, size in sizes.items()}
        if not (launch.WARP_SPECIALIZE or launch.light):
            tensors["bias"] = random(4, 200, 264, dtype=dtype)
        train = key.kernel != "attention_forward"
        tensors = {n: t.to(DEVICE).requires_grad_(train) for n, t in tensors.items()}
        options = {"causal": "bottom_right"}
        assert_within_budget(
            ops.attention, reference.attention, tensors, options, impl="triton",
            reduction=264 * key.head_dim,
        )  # fmt: skip
        for case in key.cases().values():
            if takes(launch, case):
                check_last_rows(call_of(case, train), case, attention_cases.make(case).ours)
                run_of(key, case)()  # compiles exactly what is timed


def judge(key: Key, todo: list[int]) -> Iterator[str]:
    """What is wrong with each of these launches, "" where nothing is; in a process of its own."""
    listed = key.listed()
    for index in todo:
        try:
            check(key, listed[index])
        except Exception as error:
            yield " ".join(f"{type(error).__name__}: {error}".split())[:300]
            # where this raises, the process can judge no more
            torch.cuda.synchronize()
        else:
            yield ""


def verdicts(key: Key, deadline: float) -> list[str | None]:
    """Of all launches of ``key``: "" for right, what is wrong, or None where time ran out."""
    count = len(key.listed())
    found: list[str | None] = []
    while len(found) < count:
        todo = list(range(len(found), count))
        command = [sys.executable, "-m", "benchmarks.tune_attention", "--judge"]
        process = subprocess.Popen(
            [*command, json.dumps([*key, todo])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            told, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            told, _ = process.communicate()
            found += [json.loads(line) for line in told.splitlines()]
            return [*found, *([None] * (count - len(found)))]
        found += [json.loads(line) for line in told.splitlines()]
        if process.returncode != 0 and len(told.splitlines()) < len(todo):
            last = (errors.strip().splitlines() or ["no message"])[-1]
            if not told or json.loads(told.splitlines()[-1]) == "":
                found.append(f"ended its process: {last[:300]}")
    return found


def ranked(key: Key, right: list[Launch]) -> Ranked:
    """The launches with their milliseconds, the fastest first: mean ratio to each case's best."""
    milliseconds: dict[Launch, dict[str, float]] = {launch: {} for launch in right}
    ratios: dict[Launch, list[float]] = {launch: [] for launch in right}
    for name, case in key.cases().items():
        run = run_of(key, case)

        def forced_run(launch: Launch, run: cuda.Run = run) -> None:
            with launches.forced(**{key.kernel: launch}):
                run()

        taking = [launch for launch in right if takes(launch, case)]
        if not taking:
            continue
        runs = {str(i): lambda launch=launch: forced_run(launch) for i, launch in enumerate(taking)}
        samples = cuda.measure(runs, ROUNDS)
        medians = [statistics.median(samples[str(i)].device) for i in range(len(taking))]
        for launch, seconds in zip(taking, medians, strict=True):
            milliseconds[launch][name] = 1e3 * seconds
            ratios[launch].append(seconds / min(medians))
    timed = [launch for launch in right if ratios[launch]]
    order = sorted(timed, key=lambda launch: round(statistics.mean(ratios[launch]) / NOISE))
    return [(launch, milliseconds[launch]) for launch in order]


def source(key: Key, arch: int, ranking: Ranked) -> str:
    """Python that replaces the entry."""
    lines = [f'TABLE["{key.kernel}"][{arch}][{key.size}][{key.head_dim}] = (']
    for launch, milliseconds in ranking:
        times = ", ".join(f"{name} {value:.3f}" for name, value in milliseconds.items())
        lines.append(f"    {written(launch)},  # {times} ms")
    if not universal(ranking[-1][0]):
        fallback = next(launch for launch, _ in ranking if universal(launch))
        lines.append(f"    {written(fallback)},  # once more: the last one fits every call")
    return "\n".join([*lines, ")"])


def written(launch: Launch) -> str:
    """As the tables are written."""
    fields = asdict(launch)
    flags = [f"{name}=True" for name, value in fields.items() if value is True]
    numbers = [str(value) for value in fields.values() if not isinstance(value, bool)]
    return f"Launch({', '.join(numbers + flags)})"


def tune(minutes: float) -> tuple[list[str], dict[str, Any]]:
    """(pieces of source, everything that was found) within the time."""
    deadline = time.monotonic() + 60 * minutes
    arch = architecture(torch.device(DEVICE))
    keys = [
        Key(kernel, size, head_dim)
        for size in DTYPES
        for head_dim in HEAD_DIMS
        for kernel in launches.TABLE
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # the last minute or fifth is for timing
        until = deadline - max(60 * minutes / 5, 60)
        judged = dict(zip(keys, pool.map(lambda key: verdicts(key, until), keys), strict=True))
    print(f"# compared; {deadline - time.monotonic():.0f} s are left for timing", file=sys.stderr)
    pieces, entries = [], []
    for key, words in judged.items():
        listed = key.listed()
        right = [launch for launch, word in zip(listed, words, strict=True) if word == ""]
        wrong = {written(launch): word for launch, word in zip(listed, words, strict=True) if word}
        entry: dict[str, Any] = {**key._asdict(), "before": [written(n) for n in listed]}
        entries.append(entry | {"wrong": wrong})
        notes = [f"# wrong: {name}: {word}" for name, word in wrong.items()]
        if None in words or time.monotonic() > deadline:
            pieces.append(f"# {key}: out of time, not ranked")
        elif not any(universal(launch) for launch in right):
            pieces.append("\n".join([f"# {key}: no launch is right that fits every call", *notes]))
        else:
            try:
                ranking = ranked(key, right)
            except RuntimeError as error:  # out of memory, say: the other keys go on
                pieces.append(f"# {key}: not ranked: {str(error).splitlines()[0]}")
                continue
            entries[-1]["ms"] = {written(launch): times for launch, times in ranking}
            pieces.append("\n".join([*notes, source(key, arch, ranking)]))
    return pieces, {"entries": entries, "state": cuda.state(), **versions(), **machine()}


def main() -> None:
    """Read the arguments, tune, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="no new work after this time")
    parser.add_argument("--json", type=Path, help="also write everything that was found")
    parser.add_argument("--judge", help=argparse.SUPPRESS)  # what its own processes are told
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    if arguments.judge is not None:
        *key, todo = json.loads(arguments.judge)
        with redirect_stdout(sys.stderr):  # who else prints does not speak to the tuner
            for verdict in judge(Key(*key), todo):
                print(json.dumps(verdict), file=sys.__stdout__, flush=True)
        return
    pieces, found = tune(arguments.minutes)
    print(f"# {found['GPU']}, triton {found['triton']}, {found['state']}")
    print("\n".join(pieces))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
