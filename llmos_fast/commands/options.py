"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, Option

from llmos_fast.checkpoints.storage import current_folder

Device = Annotated[str, Option(help="Where to compute: cpu, cuda or cuda:N.")]
Threads = Annotated[int, Option(help="CPU threads; 0 leaves the choice to PyTorch.", min=0)]
AnyModel = Annotated[
    Path,
    Argument(
        help="The folder of a run, checkpoint or Hugging Face model, a .gguf file, llama2.c's "
        ".bin, or owner/name on the hub."
    ),
]
Scheme = Annotated[
    str | None,
    Option(help="Quantize a pretrained model as it is read: int8, int4, int4_asym, nf4."),
]
GroupSize = Annotated[int, Option(help="Weights of 4 bits that share a scale.", min=1)]
Temperature = Annotated[float, Option(help="0 takes the most likely token.")]
TopK = Annotated[int, Option(help="Draw from this many tokens; 0: from all.")]
TopP = Annotated[float, Option(help="Draw from the tokens that make up this share.")]
MinP = Annotated[float, Option(help="Least share of the most likely token's probability.")]
RepetitionPenalty = Annotated[float, Option(help="Divides the logits of tokens that occurred.")]
Seed = Annotated[int, Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, Option(help="Text that ends the answer; may be repeated.")]
Int8Cache = Annotated[bool, Option("--int8-cache", help="Keep keys and values in 8 bits.")]

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
