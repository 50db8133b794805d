"""Which assembler Triton uses for Hopper: one before 13.3 can miscompile pipelined products.

It reuses the registers of a product's left operand, the probabilities, while the product still
reads them (triton issue 9433; mended in CUDA 13.3). Triton before 3.9 brings 12.x for Hopper.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import torch
from triton import knobs
from triton.backends.nvidia import compiler

_FIXED = (13, 3)
REMEDY = (
    'install a newer one (pip install "llmos-fast[ptxas]"; it needs CUDA 13 and is found by '
    "itself), or let TRITON_PTXAS_PATH name one of 13.3 or later"
)


def version(arch: int = 90) -> str:
    """The version that Triton uses for that architecture, as in "12.8.93"."""
    text = compiler.get_ptxas_version(arch)
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else text.strip()


def prefer_newer() -> None:
    """Let Triton assemble with the ptxas of the [ptxas] extra, where that mends the hazard.

    Nothing changes where the extra is not installed, TRITON_PTXAS_PATH is set, torch is not built
    for CUDA 13 (an older driver would not load the code), Triton's own is new enough, or Triton
    has already asked for a version: that is part of the name under which it caches kernels.
    """
    if not (torch.version.cuda or "").startswith("13.") or "TRITON_PTXAS_PATH" in os.environ:
        return
    installed = _installed()
    if installed is None or compiler.get_ptxas_version.cache_info().currsize > 0:
        return
    if _release(compiler.get_ptxas(90)) < _FIXED <= _release(installed):
        knobs.nvidia.ptxas = installed.path


def _installed() -> knobs.NvidiaTool | None:
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        path = Path(folder) / "cu13" / "bin" / "ptxas"
        if os.access(path, os.X_OK) and (tool := knobs.NvidiaTool.from_path(str(path))):
            return tool
    return None


def _release(tool: knobs.NvidiaTool) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))
