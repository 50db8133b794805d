"""``llmos-fast quantize``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Option

from llmos_fast.commands.options import CheckpointFolder, find_checkpoint
from llmos_fast.commands.terminal import console, megabytes, print_table
from llmos_fast.training import Checkpoint, Quantization, quantize_linears


def quantize(
    checkpoint: CheckpointFolder,
    scheme: Annotated[
        str,
        Option(help="int8, int4, int4_asym, nf4, fp8; _a16: float activations."),
    ] = "int8",
    group_size: Annotated[int, Option(help="Weights that share a scale.", min=1)] = 64,
    output: Annotated[
        Path | None, Option(help="New checkpoint folder; without it, beside the old one.")
    ] = None,
) -> None:
    """Store the weights of a model's linear layers in 8 or 4 bits."""
    source = find_checkpoint(checkpoint)
    target = output or source.with_name(f"{source.name}-{scheme}")
    loaded = Checkpoint.load(source)
    if loaded.quantization is not None:
        raise ValueError(f"{source} is quantized already, to {loaded.quantization.scheme}")
    save_quantized(loaded, Quantization(scheme, group_size), target)
    rows = [(str(folder), megabytes(weights_size(folder))) for folder in (source, target)]
    print_table(console(), "Weights on disk", ("checkpoint", "size"), rows)


def save_quantized(checkpoint: Checkpoint, quantization: Quantization, folder: Path) -> Checkpoint:
    """Quantize the model of ``checkpoint`` in place and save it in ``folder``."""
    quantize_linears(checkpoint.model, quantization)
    quantized = replace(checkpoint, quantization=quantization)
    quantized.save(folder)
    return quantized


def weights_size(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return (folder / "model.safetensors").stat().st_size
