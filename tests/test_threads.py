"""Where the command line lets OpenMP's threads run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmos_fast_command
from llmos_fast import _C, info

ROOT = Path(__file__).parent.parent
BOUND = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *BOUND, "GOMP_CPU_AFFINITY")
PROBE = """
import os, sys
from types import ModuleType
import llmos_fast_command
before = os.sched_getaffinity(0), dict(os.environ)

def probe():
    import torch
    from llmos_fast import _C, info
    torch.ones(300, 300) @ torch.ones(300, 300)
    (torch.ones(10**6) + 1).sum()
    assert (os.sched_getaffinity(0), dict(os.environ)) == before
    masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    print(_C.threads_are_bound(), sum(len(mask) == 1 for mask in masks), info.machine()["threads"])

sys.modules["llmos_fast.cli"] = cli = ModuleType("llmos_fast.cli")
cli.main = probe
llmos_fast_command.main()
"""


def probe(*arguments, **environment):
    """Bound or not, threads that may run on one processor only, what ``info`` says."""
    kept = {k: v for k, v in os.environ.items() if k not in CHOSEN}
    kept["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True,
        text=True,
        env=kept | environment,
    )
    assert run.returncode == 0, run.stderr
    bound, threads, said = run.stdout.strip().split(" ", 2)
    return bound == "True", int(threads), said


several = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="NOT CHECKED: one processor only"
)


@several
def test_the_command_line_binds_all_threads_but_its_own():
    bound, threads, said = probe("train")
    assert bound
    assert threads >= 1
    assert said.endswith(", bound to cores")


@several
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (("train", "--threads", "1"), {}),
        (("train",), {"OMP_NUM_THREADS": "1"}),
        (("train",), {"OMP_PROC_BIND": "false"}),
    ],
    ids=str,
)
def test_it_leaves_alone_what_the_user_chose(arguments, environment):
    bound, threads, said = probe(*arguments, **environment)
    assert not bound
    assert threads == 0
    assert said == "1" or said.endswith("set OMP_PROC_BIND=close OMP_PLACES=cores")


@pytest.mark.parametrize(
    ("environment", "arguments", "processors", "expected"),
    [
        ({}, ["train"], 2, BOUND),
        ({"OMP_NUM_THREADS": "2"}, [], 2, BOUND),
        ({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "2"}, [], 2, BOUND),
        ({"OMP_NUM_THREADS": "1"}, [], 2, {}),
        ({"OMP_NUM_THREADS": "2,1"}, [], 2, {}),
        ({"MKL_NUM_THREADS": "1"}, [], 2, {}),
        ({}, ["chat", "--threads=2"], 2, {}),
        ({}, [], 1, {}),
        ({"OMP_PLACES": "threads"}, [], 2, {}),
        ({"GOMP_CPU_AFFINITY": "0"}, [], 2, {}),
    ],
    ids=str,
)
def test_binding(monkeypatch, environment, arguments, processors, expected):
    monkeypatch.setattr(llmos_fast_command.os.path, "exists", lambda _: True)
    assert llmos_fast_command.binding(environment, arguments, range(processors)) == expected
    monkeypatch.setattr(llmos_fast_command.os.path, "exists", lambda _: False)
    assert llmos_fast_command.binding(environment, arguments, range(processors)) == {}


@pytest.mark.parametrize(
    ("count", "bound", "said"),
    [
        (4, True, "4, bound to cores"),
        (4, False, "4; unbound, two may share a core: set OMP_PROC_BIND=close OMP_PLACES=cores"),
        (1, False, "1"),
    ],
)
def test_info(monkeypatch, count, bound, said):
    monkeypatch.setattr(info.torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(_C, "threads_are_bound", lambda: bound)
    assert info.machine()["threads"] == said
