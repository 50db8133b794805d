"""Peak memory of training, each measured in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# VmHWM is the process's own peak; ru_maxrss would be that of the process it was started from
_THREE_STEPS = """
import importlib, json, sys
from benchmarks.memory_generate import status
step = importlib.import_module(sys.argv[1]).named_step(*json.loads(sys.argv[2]))
for _ in range(3): step()
print(status()["peak"])
"""


def peak_bytes(module: str, library: str, shape: object) -> int:
    """Of a process that makes three of the steps that the module's ``named_step`` gives."""
    result = subprocess.run(
        [sys.executable, "-c", _THREE_STEPS, module, json.dumps([library, shape])],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


def compare_peaks(benchmark: Any, module: str, shape: object) -> None:
    """Ours and torch.nn's, into ``extra_info``."""
    ours = benchmark.pedantic(peak_bytes, args=(module, "llmos_fast", shape), rounds=1)
    theirs = peak_bytes(module, "torch.nn", shape)
    benchmark.extra_info.update(
        peak_mib=ours / 2**20, peers_peak_mib={"torch.nn": theirs / 2**20}, ratio=ours / theirs
    )
