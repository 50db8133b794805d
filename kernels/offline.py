"""Compile what the kernels' launchers would launch, for a GPU that is not there, and judge it.

The real host code runs on meta tensors: what comes out is what a GPU would be given.

    python -m llmos_fast.kernels.offline 90 --part 0 --of 2     # one line of JSON per kernel
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from . import ptxas, runtime
from .attention_arguments import Arguments
from .attention_backward import backward
from .attention_decode import LARGEST_HEAD_DIM, decode
from .attention_forward import empty_outputs, forward
from .launch import TABLE, Launch, forced

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# of a block: H100 and H200; A100
SHARED_MEMORY = {90: 232_448, 80: 166_912}
LIGHT_CASES = ("causal", "full", "packed")
HEAVY_CASES = (*LIGHT_CASES, "dropout", "scores", "mask")
BIAS_CASES = ("scores", "bias dropout")


@dataclass(frozen=True)
class Compiled:
    """A kernel as the assembler left it; the last four count instructions of the PTX.

    Attributes:
        kernel: its name.
        registers: of a thread.
        stack: bytes of a thread: spilled registers.
        shared: bytes of shared memory of a block.
        wgmma: products of Hopper's tensor cores.
        mma: products of the older ones.
        tma: tiles moved by the copy engine.
        setmaxnreg: what specialised warps begin with.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    tma: int
    setmaxnreg: int


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


def example(case: str, head_dim: int, dtype: torch.dtype, aligned: bool) -> Arguments:
    """A call of attention on meta tensors; one that is not aligned cannot be loaded by TMA."""
    batch, heads_q, heads_kv, seq = 2, 16, 4, 4096
    head_dim, seq = (head_dim, seq) if aligned else (head_dim - 3, seq - 5)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    cases: dict[str, dict[str, Any]] = {
        "causal": {"causal": "top_left"},
        "full": {},
        "packed": {"causal": "bottom_right", "window_left": 1000, "sinks": empty(heads_q)},
        "dropout": {"causal": "top_left", "dropout_p": 0.1},
        "scores": {"causal": "top_left", "softcap": 30.0},
        "mask": {},
        "bias dropout": {"dropout_p": 0.1},
    }
    tensors: dict[str, Any] = dict.fromkeys(Arguments._fields)
    query = empty(batch, heads_q, seq, head_dim)
    key = empty(batch, heads_kv, seq, head_dim)
    if case == "packed":
        query, key = (t.transpose(1, 2).reshape(batch * seq, -1, head_dim) for t in (query, key))
        cu = empty(9, dtype=torch.int32)
        tensors |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    if "dropout" in case:
        tensors["seed"] = torch.empty((), dtype=torch.int64, device="meta")
    if case == "scores":
        tensors["alibi_slopes"] = empty(heads_q, dtype=torch.float32)
    if case in ("scores", "bias dropout"):
        tensors["bias"] = empty(1, heads_q, seq, seq)
    if case == "mask":
        tensors["mask"] = empty(batch, 1, seq, seq, dtype=torch.bool)
    defaults = {
        "max_seqlen_q": seq, "max_seqlen_k": seq, "causal": "", "window_left": -1,
        "window_right": -1, "softcap": 0.0, "dropout_p": 0.0, "scale": 0.1,
    }  # fmt: skip
    given = {"query": query, "key": key, "value": key}
    return Arguments(**(tensors | given | defaults | cases[case]))


def compile_launch(
    arch: int, kernel: str, launch: Launch, case: str, head_dim: int, dtype: torch.dtype
) -> Compiled:
    """One kernel, launched so, for the example call of that name."""
    # odd sizes are gated up to 128 on sm_90 only: they are rare, and may spill a few registers
    aligned = launch.TMA or launch.light or head_dim > 128 or arch == 80
    a = example(case, head_dim, dtype, aligned)

    def run() -> None:
        with forced(**{kernel: launch}):
            if kernel == "attention_forward":
                forward(a)
            else:
                out, lse = empty_outputs(a)
                need_bias = kernel == "attention_backward_bias"
                backward(a, out, lse, out, None, need_bias=need_bias, need_sinks=False)

    return compiled(arch, kernel, run)


def faults(
    arch: int, launch: Launch, head_dim: int, dtype: torch.dtype, code: Compiled
) -> list[str]:
    """What the gate has against it, as sentences.

    Two may spill: fp32, whose three tf32 products keep operands in registers twice, and the
    gradient of a bias at head_dim 512.
    """
    spills_anyway = dtype.itemsize == 4 or (
        code.kernel == "attention_backward_bias" and head_dim > 256
    )
    rows = launch.BLOCK_N if code.kernel == "attention_backward_key" else launch.BLOCK_M
    wgmma = arch == 90 and dtype.itemsize == 2 and rows >= 64
    limit = SHARED_MEMORY[arch]
    rules = {
        f"spills {code.stack} bytes": code.stack == 0 or spills_anyway,
        f"needs {code.shared} of {limit} bytes of shared memory": code.shared <= limit,
        f"has {code.wgmma} wgmma": code.wgmma > 0 or not wgmma,
        f"has {code.wgmma + code.mma} tensor core products": code.wgmma + code.mma > 0,
        f"has {code.tma} TMA loads": (code.tma > 0) == (launch.TMA and arch == 90),
        f"has {code.setmaxnreg} setmaxnreg": (code.setmaxnreg > 0) == launch.WARP_SPECIALIZE,
    }
    return [sentence for sentence, holds in rules.items() if not holds]


def jobs(arch: int) -> Iterator[tuple[str, Launch, str, int, torch.dtype]]:
    """Everything that the gate compiles: (kernel, launch, case, head_dim, dtype)."""
    for kernel, table in TABLE.items():
        for dtype in (torch.bfloat16, torch.float32):
            for head_dim, listed in table[arch][dtype.itemsize].items():
                for launch in dict.fromkeys(listed):
                    for case in _cases(kernel, launch):
                        yield kernel, launch, case, head_dim, dtype


def _cases(kernel: str, launch: Launch) -> tuple[str, ...]:
    """Names of the example calls that a launch has to serve."""
    if kernel == "attention_backward_bias":
        return BIAS_CASES
    if launch.WARP_SPECIALIZE:
        return ("causal", "full")
    return LIGHT_CASES if launch.light else HEAVY_CASES


def describe(kernel: str, launch: Launch, case: str, head_dim: int, dtype: torch.dtype) -> str:
    """One line that names a job."""
    flags = "".join(f" {n}" for n in ("TMA", "WARP_SPECIALIZE", "light") if getattr(launch, n))
    tiles = f"{launch.BLOCK_M}x{launch.BLOCK_N} warps {launch.num_warps} stages {launch.num_stages}"
    return f"{kernel} {str(dtype)[6:]} D{head_dim} {tiles}{flags}: {case}"


def decode_jobs() -> Iterator[tuple[int, int, int, int, bool]]:
    """Likewise for attention_decode: the arguments of its ``choose_launch``."""
    for query_bytes, largest in LARGEST_HEAD_DIM.items():
        head_dims = [head_dim for head_dim in (64, 128, 256, 512) if head_dim <= largest]
        yield from product((16, 32), (query_bytes,), (1, query_bytes), head_dims, (False, True))


def compile_decode(
    arch: int, group_rows: int, query_bytes: int, cache_bytes: int, head_dim: int, paged: bool
) -> Compiled:
    """The kernel of attention_decode for ``group_rows`` queries of a key head and a long cache."""
    batch, heads_kv, pages, page_size = 2, 2, 512, 16
    dtype = torch.bfloat16 if query_bytes == 2 else torch.float32
    quantized = cache_bytes == 1

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    query = empty(batch, heads_kv * group_rows, 1, head_dim)
    shape = (pages, heads_kv, page_size) if paged else (batch, heads_kv, pages * page_size)
    cache = empty(*shape, head_dim, dtype=torch.int8 if quantized else dtype)
    factors = empty(*shape, dtype=torch.float32) if quantized else None
    table = empty(batch, pages, dtype=torch.int32) if paged else None
    lengths = empty(batch, dtype=torch.int32)

    def run() -> None:
        decode(query, cache, cache, lengths, table, factors, factors, None, None, 0.1, -1, 0.0)

    return compiled(arch, "attention_split", run)


def decode_faults(arch: int, code: Compiled) -> list[str]:
    """What the gate has against it."""
    limit = SHARED_MEMORY[arch]
    rules = {
        f"spills {code.stack} bytes": code.stack == 0,
        f"needs {code.shared} of {limit} bytes of shared memory": code.shared <= limit,
        f"has {code.mma} tensor core products": code.mma > 0,
    }
    return [sentence for sentence, holds in rules.items() if not holds]


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
    for job in list(jobs(arch))[part::of]:
        kernel, launch, case, head_dim, dtype = job
        code = compile_launch(arch, kernel, launch, case, head_dim, dtype)
        yield _line(describe(*job), faults(arch, launch, head_dim, dtype, code), code)
    for decode_job in list(decode_jobs())[part::of]:
        code = compile_decode(arch, *decode_job)
        rows, query_bytes, cache_bytes, width, paged = decode_job
        name = f"attention_decode {rows} rows of {query_bytes} bytes, D{width}, "
        name += f"cache of {cache_bytes} bytes{' in pages' * paged}"
        yield _line(name, decode_faults(arch, code), code)


def _line(name: str, wrong: list[str], code: Compiled) -> str:
    return json.dumps({"job": name, "faults": wrong, **asdict(code)})


if __name__ == "__main__":
    main()
