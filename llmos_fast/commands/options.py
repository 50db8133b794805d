"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, Option

from llmos_fast.training.storage import current_folder

Device = Annotated[str, Option(help="Where to compute: cpu, cuda or cuda:N.")]
Threads = Annotated[int, Option(help="CPU threads; 0 leaves the choice to PyTorch.", min=0)]
CheckpointFolder = Annotated[Path, Argument(help="A checkpoint folder, or the folder of a run.")]

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_machine(device: str, threads: int) -> None:
    """Set the number of threads. Raises ValueError where ``device`` cannot be used."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that PyTorch can use; none was found")
    if threads:
        torch.set_num_threads(threads)


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint folder in a run's folder, or ``folder`` itself."""
    inside = current_folder(folder / "checkpoint")
    return inside if inside.is_dir() else folder
