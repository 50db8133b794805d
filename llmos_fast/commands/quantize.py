"""``llmos-fast quantize``."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated

from torch import Tensor
from typer import Option

from llmos_fast.commands.opened import is_pretrained
from llmos_fast.commands.options import AnyModel, find_checkpoint
from llmos_fast.commands.terminal import console, megabytes, print_table
from llmos_fast.data import encode_lines, load_tokenizer, open_corpus, windows
from llmos_fast.models import Quantization, load
from llmos_fast.nn import quantize_
from llmos_fast.training import (
    Checkpoint,
    TrainingConfig,
    evaluation_windows,
    perplexity,
)

# Of the training text: a few hundred times the width of a small model, in a second or two.
_CALIBRATION_LINES = 2000
_CALIBRATION_WINDOWS = 32
_CALIBRATION_ROWS = 20
# Of the validation text; WikiText-2 has fewer.
_VALIDATION_LINES = 5000


def quantize(
    checkpoint: AnyModel,
    scheme: Annotated[
        str,
        Option(help="int8, int4, int4_asym, nf4, fp8, fp8_block; _a16: float activations."),
    ] = "int8",
    group_size: Annotated[int, Option(help="Weights that share a scale.", min=1)] = 64,
    method: Annotated[str, Option(help="absmax, mse, or gptq, which reads training text.")] = "mse",
    bits: Annotated[
        float | None,
        Option(help="Average per weight: layers that suffer most from 4 bits get 8."),
    ] = None,
    embeddings: Annotated[bool, Option("--embeddings", help="Embeddings as well.")] = False,
    output: Annotated[
        Path | None, Option(help="New checkpoint folder; without it, beside the old one.")
    ] = None,
) -> None:
    """Store the weights of a model's linear layers in 8 or 4 bits."""
    source = find_checkpoint(checkpoint)
    target = output or source.with_name(f"{source.name}-{scheme}")
    if is_pretrained(source):
        _quantize_pretrained(source, target, scheme, group_size, method, bits, embeddings)
        return
    loaded = Checkpoint.load(source)
    if loaded.quantization is not None:
        raise ValueError(f"{source} is quantized already, to {loaded.quantization.scheme}")
    before = _validation_perplexity(loaded)
    quantized = save_quantized(
        loaded, scheme, group_size, target, method=method, bits=bits, embeddings=embeddings
    )
    after = _validation_perplexity(quantized)
    rows = [
        (str(folder), megabytes(weights_size(folder)), f"{value:.2f}")
        for folder, value in ((source, before), (target, after))
    ]
    print_table(console(), "Quantization", ("checkpoint", "size", "validation perplexity"), rows)


def _quantize_pretrained(
    source: Path,
    target: Path,
    scheme: str,
    group_size: int,
    method: str,
    bits: float | None,
    embeddings: bool,
) -> None:
    """A weight at a time, without text to calibrate on."""
    if method == "gptq" or bits is not None:
        raise ValueError(
            "--method gptq and --bits read the text a model was trained on, which a pretrained "
            "one does not come with; llmos_fast.quantize_ takes calibration"
        )
    started = time.perf_counter()
    model = load(source, scheme=scheme, group_size=group_size, method=method, embeddings=embeddings)
    model.save(target, load_tokenizer(source))
    row = (str(target), megabytes(weights_size(target)), f"{time.perf_counter() - started:.1f} s")
    print_table(console(), "Quantization", ("checkpoint", "size", "took"), [row])


def save_quantized(
    checkpoint: Checkpoint,
    scheme: str,
    group_size: int,
    folder: Path,
    *,
    method: str = "mse",
    bits: float | None = None,
    embeddings: bool = False,
) -> Checkpoint:
    """Quantize the model of ``checkpoint`` in place, as ``quantize_`` does, and save it."""
    report = quantize_(
        checkpoint.model,
        scheme,
        group_size,
        method=method,
        calibration=None if method != "gptq" and bits is None else calibration_windows(checkpoint),
        bits=bits,
        embeddings=embeddings,
    )
    others = {layer.name: layer.scheme for layer in report.layers if layer.scheme != scheme}
    record = Quantization(scheme, group_size, others, embeddings)
    quantized = replace(checkpoint, quantization=record)
    quantized.save(folder)
    return quantized


def calibration_windows(checkpoint: Checkpoint) -> list[Tensor]:
    """Int[batch seq], a few dozen: the beginning of the text that the model was trained on."""
    lines = islice(open_corpus(checkpoint.text).lines("train"), _CALIBRATION_LINES)
    tokens = encode_lines(checkpoint.tokenizer, lines)
    rows = min(_CALIBRATION_ROWS, max(1, tokens.numel() // (checkpoint.context + 1)))
    text = windows(tokens, rows, checkpoint.context)
    return [text.window(i)[0] for i in range(min(len(text), _CALIBRATION_WINDOWS))]


def weights_size(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return (folder / "model.safetensors").stat().st_size


def _validation_perplexity(checkpoint: Checkpoint) -> float:
    lines = islice(open_corpus(checkpoint.text).lines("valid"), _VALIDATION_LINES)
    tokens = encode_lines(checkpoint.tokenizer, lines)
    return perplexity(
        checkpoint.model, evaluation_windows(tokens, TrainingConfig(bptt=checkpoint.context))
    )
