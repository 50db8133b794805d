"""The compiled extension: one OpenMP runtime, torch's thread count, the CPU's instructions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmos_fast import _C

OPENMP_RUNTIMES = """
import torch
from pathlib import Path
from llmos_fast import ops

ops.dropout(torch.ones(100, 100), 0.5)
lines = Path("/proc/self/maps").read_text().splitlines()
libraries = {line.split()[-1] for line in lines if ".so" in line}
print(*(p for p in libraries if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime_is_mapped():
    """In a process of its own: what other tests import may bring another one."""
    run = subprocess.run(
        [sys.executable, "-c", OPENMP_RUNTIMES], capture_output=True, text=True, check=True
    )
    assert len(run.stdout.split()) == 1, run.stdout


def test_torch_sets_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert _C.max_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_threads_are_started(threads):
    code = (
        f"import torch, os; torch.set_num_threads({threads})\n"
        "from llmos_fast import ops\n"
        "torch.ones(512, 512) @ torch.ones(512, 512); (torch.ones(10**6) + 1).sum()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "for _ in range(3): ops.dropout(torch.ones(512, 512), 0.5)\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) == 0


def test_sets_end_with_generic_and_refuse_nonsense():
    assert _C.cpu_sets()[-1] == "generic"
    with pytest.raises(ValueError, match=r"sse9 is not one of: .*generic"):
        _C.force_cpu("sse9")
