"""Losses of torch.nn's layers and ours, step by step on WikiText-2: GPT-2's architecture, small.

    python -m benchmarks.loss_curve --steps 200 --out curves.json

Width 256, 4 layers, 4 heads, 8 rows of 128 tokens; no dropout, the same initial weights and text.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Option

from llmos_fast.commands.options import Threads, use_machine
from llmos_fast.data import Windows, build_vocab, encode_lines, open_corpus, windows

from .training_models import OurGPT, Shape, TorchGPT

BATCH, SEQ, MIN_COUNT = 8, 128, 20


def losses(
    kind: type[TorchGPT], shape: Shape, text: Windows, steps: int, bf16: bool
) -> list[float]:
    torch.manual_seed(0)
    model = kind(shape, 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    found = []
    for tokens, targets in islice(text, steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main(
    steps: Annotated[int, Option(help="Training steps, at most an epoch.", min=1)] = 200,
    bf16: Annotated[bool, Option("--bf16", help="Under autocast.")] = False,
    threads: Threads = 0,
    out: Annotated[Path | None, Option(help="Also write both curves to this JSON file.")] = None,
) -> None:
    """Train both and compare every loss."""
    use_machine("cpu", threads)
    lines = list(open_corpus("wikitext-2").lines("train"))
    vocabulary = build_vocab(lines, min_count=MIN_COUNT, splitter="whitespace")
    text = windows(encode_lines(vocabulary, lines), BATCH, SEQ)
    shape = Shape(256, 4, 4, SEQ, BATCH, len(vocabulary))
    steps = min(steps, len(text) - 1)  # the last window is shorter
    kinds = {"torch.nn": TorchGPT, "llmos_fast": OurGPT}
    curves = {name: losses(kind, shape, text, steps, bf16) for name, kind in kinds.items()}
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    result: dict[str, Any] = {
        "shape": shape._asdict(),
        "steps": steps,
        "bf16": bf16,
        "first_loss": {name: curve[0] for name, curve in curves.items()},
        "last_loss": {name: curve[-1] for name, curve in curves.items()},
        "largest_difference": max(apart),
        "mean_difference": sum(apart) / steps,
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result | {"losses": curves}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
