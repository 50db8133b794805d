"""Every launch of every kernel, compiled for a GPU that is not there, and judged.

python -m llmos_fast.kernels.gate 90 --part 0 --of 2     # one line of JSON per kernel
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

import triton

from . import (
    add_norm_jobs,
    attention_jobs,
    ffn_jobs,
    fp8_matmul_jobs,
    linear_cross_entropy_jobs,
    panel_jobs,
    ptxas,
    quant_matmul_jobs,
    rotary_jobs,
)
from .offline import SHARED_MEMORY, Job, compiled, faults

FAMILIES = (
    attention_jobs,
    add_norm_jobs,
    ffn_jobs,
    fp8_matmul_jobs,
    linear_cross_entropy_jobs,
    panel_jobs,
    quant_matmul_jobs,
    rotary_jobs,
)


def jobs(arch: int) -> list[Job]:
    """Everything that is compiled for compute capability ``arch`` / 10."""
    return [job for family in FAMILIES for job in family.jobs(arch)]


def versions(arch: int) -> str:
    """What the numbers of a compiled kernel depend on, beside its source."""
    return f"triton {triton.__version__}, ptxas {ptxas.version(arch)}"


def main() -> None:
    """Compile one part of the jobs and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", type=int, choices=sorted(SHARED_MEMORY))
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    arguments = parser.parse_args()
    print(json.dumps({"versions": versions(arguments.arch)}), flush=True)
    for line in _lines(arguments.arch, arguments.part, arguments.of):
        print(line, flush=True)


def _lines(arch: int, part: int, of: int) -> Iterator[str]:
    for job in jobs(arch)[part::of]:
        code = compiled(arch, job.kernel, job.run)
        yield json.dumps({"job": job.name, "faults": faults(arch, job, code), **asdict(code)})


if __name__ == "__main__":
    main()
