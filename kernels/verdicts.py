"""Which kernels gave exact results on this GPU: asked before their first use, and kept.

Verdicts are those of one GPU model, Triton, ptxas and the sources of the kernels.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from llmos_fast import verdicts as kept

from . import ptxas
from .runtime import INTERPRETED

_lock = threading.Lock()
_verdicts: dict[tuple[torch.device, str], bool] = {}


def refusal(device: torch.device, name: str, passes: Callable[[], bool]) -> str | None:
    """Why the kernels ``name`` must not be used; None where they pass, or have passed, their test.

    While tensors are fake nothing can be tested: the operator asks again when it runs. A CUDA graph
    that is captured before the test gets the reference.
    """
    if INTERPRETED:
        return None
    if (device, name) not in _verdicts:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return None
        with _lock:
            try:
                reason = _settle(device, name, passes)
            except torch.OutOfMemoryError:
                reason = "needs more free memory on the GPU for its self-test"
        if reason is not None:
            return reason
    return None if _verdicts[device, name] else _failure()


def _settle(device: torch.device, name: str, passes: Callable[[], bool]) -> str | None:
    """Note the verdict down; None, or why there is none yet."""
    if (device, name) in _verdicts:
        return None
    verdicts = load(device)
    if name not in verdicts:
        if torch.cuda.is_current_stream_capturing():
            return "needs a first call outside of a CUDA graph, for its self-test"
        verdicts = load(device) | {name: passes()}
        store(device, verdicts)
    _verdicts[device, name] = verdicts[name]
    if not verdicts[name]:
        warnings.warn(f"llmos_fast: {name} {_failure()}; it is not used", stacklevel=4)
    return None


def _failure() -> str:
    return f"fails its self-test as ptxas {ptxas.version()} assembles it: {ptxas.REMEDY}"


@lru_cache
def environment(device: torch.device) -> dict[str, str]:
    """What a verdict depends on."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()
    return {
        "gpu": torch.cuda.get_device_name(device),
        "compute capability": str(torch.cuda.get_device_capability(device)),
        "triton": triton.__version__,
        "ptxas": ptxas.version(),
        "sources": digest,
    }


def load(device: torch.device) -> dict[str, bool]:
    """Verdicts that are kept, by name."""
    return kept.load(environment(device))


def store(device: torch.device, verdicts: dict[str, bool]) -> None:
    """Keep them, all that there are."""
    kept.store(environment(device), verdicts)
