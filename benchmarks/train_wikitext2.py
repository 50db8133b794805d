"""One epoch of PyTorch's word language model on WikiText-2: torch.nn's layers and ours.

    OMP_PROC_BIND=close OMP_PLACES=threads python -m benchmarks.train_wikitext2 --out epoch.json

The setting is that of pytorch/examples: all 33,278 words, width 200, 2 heads, 2 layers, dropout
0.2, 35 tokens by 20 rows, clipping at 0.25. Both have the same initial weights, read the same
windows and take turns step by step in one process, so that a noisy machine is noisy for both.
torch.nn's trains with torch.optim.AdamW and torch's clipping, ours with llmos_fast.optim.AdamW.
On two vCPUs of a Zen 4 a step of both takes 0.66 s, the epoch of 2983 steps some 35 minutes.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer import Option

from llmos_fast.commands.options import Threads, use_machine
from llmos_fast.data import build_vocab, encode_lines, open_corpus, windows
from llmos_fast.info import machine, versions
from llmos_fast.training import Trainer, TrainingConfig, perplexity

from .quality import MODELS, build_model

LOG_EVERY = 100


def main(
    steps: Annotated[int, Option(help="Stop after so many; 0: the whole epoch.", min=0)] = 0,
    optimizer: Annotated[str, Option(help="adamw, adam or sgd, for both.")] = "adamw",
    lr: Annotated[float, Option(help="Learning rate.")] = 1e-3,
    precision: Annotated[str, Option(help="float32 or bfloat16 (autocast).")] = "float32",
    seed: Annotated[int, Option(help="Of weights and dropout.")] = 1,
    threads: Threads = 0,
    out: Annotated[Path | None, Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Train both, compare time and perplexity."""
    use_machine("cpu", threads)
    corpus = open_corpus("wikitext-2")
    vocabulary = build_vocab(corpus.lines("train"), splitter="whitespace")
    config = TrainingConfig(
        epochs=1,
        max_steps=steps,
        clip_norm=0.25,
        optimizer=optimizer,
        learning_rate=lr,
        precision=precision,
        seed=seed,
    )
    train, valid = (encode_lines(vocabulary, corpus.lines(split)) for split in ("train", "valid"))
    text = windows(train, config.batch_size, config.bptt)
    held_out = windows(valid, config.evaluation_batch_size, config.bptt)
    models = {name: build_model(name, len(vocabulary), seed, "cpu") for name in MODELS}
    trainers = {name: Trainer(model, text, config) for name, model in models.items()}
    if optimizer == "adamw":  # as everybody who uses torch.nn
        trainers["torch"].optimizer = torch.optim.AdamW(
            models["torch"].parameters(), lr=lr, weight_decay=config.weight_decay
        )
    seconds, losses = train_in_turn(trainers)
    result: dict[str, Any] = {
        "config": asdict(config),
        "vocabulary": len(vocabulary),
        "steps": len(text) if not steps else min(steps, len(text)),
        "machine": versions() | machine(),
        "layers": {},
    }
    for name, model in models.items():
        # the first step also allocates the optimizer's state, here as in any training
        result["layers"][name] = {
            "seconds": sum(seconds[name]),
            "step_ms": 1e3 * statistics.median(seconds[name]),
            "train_loss": statistics.mean(losses[name][-LOG_EVERY:]),
            "valid_perplexity": perplexity(model, held_out),
        }
    theirs, ours = (result["layers"][name] for name in ("torch", "llmos_fast"))
    result["speedup"] = theirs["seconds"] / ours["seconds"]
    result["speedup_of_median_step"] = theirs["step_ms"] / ours["step_ms"]
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def train_in_turn(
    trainers: dict[str, Trainer],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and loss of every step, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    runs = {name: trainer.steps() for name, trainer in trainers.items()}
    for number in range(1, next(iter(trainers.values())).total_steps + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            losses[name].append(next(run).loss.item())
            seconds[name].append(time.perf_counter() - start)
        if number % LOG_EVERY == 0:
            typer.echo(f"step {number}: {describe(seconds, losses)}", err=True)
    return seconds, losses


def describe(seconds: dict[str, list[float]], losses: dict[str, list[float]]) -> str:
    parts = (
        f"{name} {sum(seconds[name]):.0f} s, loss {statistics.mean(losses[name][-LOG_EVERY:]):.3f}"
        for name in seconds
    )
    return "; ".join(parts)


if __name__ == "__main__":
    typer.run(main)
