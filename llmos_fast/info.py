"""What runs here and why: versions, the machine, and a table of op x implementation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from llmos_fast import ops
from llmos_fast.dispatch import FOLDERS, Refusal, explain
from llmos_fast.quantize import quantize
from llmos_fast.version import __version__

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of the project, Python and the packages that matter."""
    found = {"llmos_fast": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_model() -> str:
    """Name of the processor, as the kernel tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> dict[str, str]:
    """The processor, its instruction sets as the kernels use them, threads and GPU."""
    return {
        "CPU": f"{cpu_model()}, {os.cpu_count()} processors",
        "CPU kernels": _cpu_kernels(),
        "products": _products(),
        "threads": _threads(),
        "GPU": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none that torch sees",
        "LLMOS_FAST_IMPL": os.environ.get("LLMOS_FAST_IMPL", ""),
        "LLMOS_FAST_CPU": os.environ.get("LLMOS_FAST_CPU", ""),
    }


def _threads() -> str:
    count = torch.get_num_threads()
    try:
        from llmos_fast import _C
    except ImportError:
        return str(count)
    if _C.threads_are_bound():
        return f"{count}, bound to cores"
    advice = "unbound, two may share a core: set OMP_PROC_BIND=close OMP_PLACES=cores"
    return f"{count}; {advice}" if count > 1 else "1"


def _cpu_kernels() -> str:
    try:
        from llmos_fast import _C
    except ImportError as error:
        return f"not built: ops run on the reference ({error})"
    return f"{', '.join(_C.cpu_sets())} (the first one runs unless LLMOS_FAST_CPU says otherwise)"


def _products() -> str:
    try:
        from llmos_fast.native.product import route
    except ImportError:
        return "torch"
    names = {"own": "own kernel", "onednn": "oneDNN", "torch": "torch's choice (MKL, oneDNN)"}
    return ", ".join(
        f"{label}: {names[route(dtype)]}"
        for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    )


def _sample_calls(device: str) -> dict[str, Callable[[], list[Refusal]]]:
    """A small typical call of each op, explained."""

    def x(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    heads = x(1, 2, 4, 8)
    target = torch.zeros(4, dtype=torch.int64, device=device)
    weight = quantize(torch.ones(16, 32), "int8").to(device)
    lengths = torch.full((1,), 4, device=device)
    return {
        "attention": lambda: explain(ops.attention, heads, heads, heads, causal=True),
        "attention_decode": lambda: explain(ops.attention_decode, heads, heads, heads, lengths),
        "attention_weights": lambda: explain(ops.attention_weights, heads, heads, heads),
        "cache_write": lambda: explain(ops.cache_write, heads, heads, heads, heads, lengths),
        "embedding": lambda: explain(ops.embedding, target, x(9, 8), positions=x(4, 8)),
        "ffn": lambda: explain(ops.ffn, x(4, 8), x(16, 8), x(16), x(8, 16), x(8)),
        "gated_ffn": lambda: explain(ops.gated_ffn, x(4, 8), x(16, 8), x(16, 8), x(8, 16)),
        "add_norm": lambda: explain(ops.add_norm, x(4, 8), x(4, 8), x(8), x(8)),
        "dropout": lambda: explain(ops.dropout, x(4, 8), 0.1),
        "rotary": lambda: explain(ops.rotary, heads, heads, x(4, 4), x(4, 4)),
        "linear": lambda: explain(ops.linear, x(4, 8), x(16, 8), x(16)),
        "linear_cross_entropy": lambda: explain(
            ops.linear_cross_entropy, x(4, 8), x(16, 8), target
        ),
        "quant_embedding": lambda: explain(ops.quant_embedding, target, weight),
        "quant_matmul": lambda: explain(ops.quant_matmul, x(4, 32), weight),
    }


def report() -> Group:
    """Everything above, for rich to print."""
    facts = Table(title="llmos_fast", show_header=False)
    for name, value in (versions() | machine()).items():
        facts.add_row(name, value)
    tables = [facts]
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        table = Table("op", *FOLDERS, title=f"a float32 call on {device}")
        for op, refusals in _sample_calls(device).items():
            table.add_row(op, *_row(refusals()))
        tables.append(table)
    return Group(*tables)


def _row(refusals: list[Refusal]) -> list[str]:
    """What each implementation answers: "runs", why not, or that something before it runs."""
    cells = dict.fromkeys(FOLDERS, "not written")
    free = True
    for implementation, reason in refusals:
        cells[implementation] = reason or ("runs" if free else "would run")
        free = free and reason is not None
    return list(cells.values())
