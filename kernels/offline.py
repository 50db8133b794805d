"""Compile what the kernels' launchers would launch, for a GPU that is not there, and judge it.

The real host code runs on meta tensors: what comes out is what a GPU would be given.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from . import runtime

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# of a block: H100 and H200; A100
SHARED_MEMORY = {90: 232_448, 80: 166_912}
# registers, two operands in shared memory, and whether what the registers hold is added to
_BEGINS_A_SUM = re.compile(r"wgmma\.mma_async[^;]*}, \S+ \S+ 0, 1, 1;")


@dataclass(frozen=True)
class Compiled:
    """A kernel as the assembler left it; the last five count instructions of the PTX.

    Attributes:
        kernel: its name.
        registers: of a thread.
        stack: bytes of a thread: spilled registers.
        shared: bytes of shared memory of a block.
        wgmma: products of Hopper's tensor cores.
        mma: products of the older ones.
        tma: tiles moved by the copy engine.
        setmaxnreg: what specialised warps begin with.
        sums: products of Hopper's tensor cores that begin a sum, and add nothing to an older one.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    tma: int
    setmaxnreg: int
    sums: int = 0


class _Driver:
    """What triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # triton keeps compiled kernels by device: no real one may find these
        return -self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Job(NamedTuple):
    """A kernel that the gate compiles, and what must be true of it.

    Attributes:
        name: one line, the key in golden.json.
        kernel: name of the Triton function.
        run: launches it on meta tensors, among others perhaps.
        rules: ``rules(arch, code)``: sentences of complaint, and whether the code gives no reason.
        may_spill: its registers do not suffice, and that is known.
    """

    name: str
    kernel: str
    run: Callable[[], object]
    rules: Callable[[int, Compiled], dict[str, bool]]
    may_spill: bool = False


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that a job is described with."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(arch: int, kernel: str, run: Callable[[], object]) -> Compiled:
    """The named kernel as ``run()`` would launch it on compute capability ``arch`` / 10.

    Raises:
        RuntimeError: under the interpreter, where nothing can be compiled.
    """
    if runtime.INTERPRETED:
        raise RuntimeError("offline: triton was imported under TRITON_INTERPRET=1")
    found: list[Compiled] = []

    def compile_(launched: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if launched.__name__ != kernel:
            return
        binary = launched.warmup(grid=grid, **arguments)
        ptx = binary.asm["ptx"]
        found.append(
            Compiled(
                kernel,
                *_resources(binary.asm["cubin"]),
                binary.metadata.shared,
                ptx.count("wgmma.mma_async"),
                ptx.count("mma.sync"),
                ptx.count("cp.async.bulk.tensor"),
                ptx.count("setmaxnreg"),
                len(_BEGINS_A_SUM.findall(ptx)),
            )
        )

    with _offline(arch, compile_):
        run()
    return found[-1]


@contextmanager
def _offline(arch: int, compile_: Callable[..., None]) -> Iterator[None]:
    previous = driver._active
    driver.set_active(_Driver(arch))
    runtime.offline = runtime.Offline(arch, compile_)
    try:
        yield
    finally:
        runtime.offline = None
        driver.set_active(previous)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert numbers is not None, text
    return int(numbers[1]), int(numbers[2])


def faults(arch: int, job: Job, code: Compiled) -> list[str]:
    """What the gate has against it, as sentences."""
    limit = SHARED_MEMORY[arch]
    rules = {
        f"spills {code.stack} bytes": code.stack == 0 or job.may_spill,
        f"needs {code.shared} of {limit} bytes of shared memory": code.shared <= limit,
        **job.rules(arch, code),
    }
    return [sentence for sentence, holds in rules.items() if not holds]
