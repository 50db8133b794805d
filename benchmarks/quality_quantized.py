"""Perplexity of two small models in every weight format, by every way of rounding.

    llmos-fast quickstart --output runs/quickstart
    python -m benchmarks.quality_quantized --run runs/quickstart --data ../shared/data --out FILE

The first is the model of ``quickstart``, on the validation text of WikiText-2; the calibration data
is from its training text. The second is stories260K on TinyStories: it needs ``--data``, a folder
with models/stories260k and tinystories as in this project's shared data, which is not part of the
package; without it only the first is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import llmos_fast
from benchmarks import stories260k
from llmos_fast.commands.options import find_checkpoint
from llmos_fast.commands.quantize import calibration_windows
from llmos_fast.data import encode_lines, open_corpus
from llmos_fast.training import Checkpoint, TrainingConfig, evaluation_windows, perplexity

MIXED_BITS = 5.0
STORIES_WINDOW = 512


class Case(NamedTuple):
    """A model to load afresh, how it is measured, and calibration data."""

    load: Callable[[], nn.Module]
    perplexity: Callable[[Any], float]
    calibration: list[Tensor]


class Setting(NamedTuple):
    """Arguments of ``quantize_``; "mixed" is gptq at MIXED_BITS."""

    scheme: str
    group_size: int
    method: str


def settings() -> Iterator[Setting]:
    for method in ("absmax", "mse", "gptq"):
        for scheme in ("int8", "fp8", "fp8_block"):
            yield Setting(scheme, 128, method)
    for scheme in ("int4", "int4_asym", "nf4"):
        for group_size in (32, 64):
            for method in ("absmax", "mse", "gptq", "mixed"):
                yield Setting(scheme, group_size, method)


def word_model(run: Path) -> Case:
    folder = find_checkpoint(run)
    first = Checkpoint.load(folder)
    config = TrainingConfig(bptt=first.context)
    lines = open_corpus(first.text).lines("valid")
    held_out = evaluation_windows(encode_lines(first.tokenizer, lines), config)
    return Case(
        lambda: Checkpoint.load(folder).model,
        lambda model: perplexity(model, held_out),
        calibration_windows(first),
    )


def stories(data: Path) -> Case:
    folder = data / "models" / "stories260k"
    tokenizer = stories260k.Tokenizer(folder / "tok512.bin")
    texts = data / "tinystories"
    valid = stories260k.validation_stories(texts)
    held_out = stories260k.windows(tokenizer, valid, 128, STORIES_WINDOW)
    train = stories260k.training_stories(texts)
    calibration = stories260k.windows(tokenizer, train, 16, STORIES_WINDOW)

    @torch.no_grad()
    def measure(model: Any) -> float:
        losses = []
        for rows in held_out.split(8):
            logits = model(rows).logits[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item())
        return math.exp(sum(losses) / len(losses))

    return Case(
        lambda: stories260k.load_model(folder / "stories260K.bin"),
        measure,
        list(calibration.split(4)),
    )


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    model = case.load()
    scheme, group_size, method = setting
    arguments: dict[str, Any] = {"method": method}
    if method in ("gptq", "mixed"):
        arguments = {"calibration": case.calibration}
    if method == "mixed":
        arguments["bits"] = MIXED_BITS
    start = time.perf_counter()
    report = llmos_fast.quantize_(model, scheme, group_size, **arguments)
    seconds = time.perf_counter() - start
    return {
        **setting._asdict(),
        "bits": report.bits,
        "perplexity": case.perplexity(model),
        "seconds": seconds,
        "wide_layers": [layer.name for layer in report.layers if layer.scheme != scheme],
    }


def main() -> None:
    """Measure, and write a JSON file after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--data", type=Path, help="folder with models/stories260k, tinystories")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    cases = {"quickstart, WikiText-2": word_model(arguments.run)}
    if arguments.data is None or not (arguments.data / "models" / "stories260k").is_dir():
        print("SKIPPED: stories260K, no --data with models/stories260k", file=sys.stderr)
    else:
        cases["stories260K, TinyStories"] = stories(arguments.data)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": arguments.threads,
        "mixed_bits": MIXED_BITS,
        "models": {},
    }
    for name, case in cases.items():
        unrounded = case.perplexity(case.load())
        print(f"{name}: fp32 {unrounded:.4f}")
        rows: list[dict[str, Any]] = []
        result["models"][name] = {"fp32_perplexity": unrounded, "rows": rows}
        for setting in settings():
            rows.append(measure(case, setting))
            row = rows[-1]
            print(
                f"{setting.scheme:10} {setting.group_size:4} {setting.method:7} "
                f"{row['bits']:5.2f} bits  {row['perplexity']:9.4f}  {row['seconds']:6.1f} s",
                flush=True,
            )
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
