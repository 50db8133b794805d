"""``llmos-fast evaluate``."""

from __future__ import annotations

import time
from typing import Annotated

from typer import Option

from llmos_fast.commands.options import (
    DEFAULT_DEVICE,
    CheckpointFolder,
    Device,
    Threads,
    find_checkpoint,
    use_machine,
)
from llmos_fast.commands.terminal import console, print_table
from llmos_fast.data import encode_lines, open_corpus, windows
from llmos_fast.training import Checkpoint, perplexity


def evaluate(
    checkpoint: CheckpointFolder,
    text: Annotated[
        str | None, Option(help="Text as for train; without it, the text of the training.")
    ] = None,
    split: Annotated[str, Option(help="train, valid or test.")] = "valid",
    batch_size: Annotated[int, Option(help="Rows read side by side.")] = 10,
    bptt: Annotated[
        int | None, Option(help="Tokens the model sees at once; without it, as in training.")
    ] = None,
    device: Device = DEFAULT_DEVICE,
    threads: Threads = 0,
) -> None:
    """Measure a model's perplexity on held-out text."""
    use_machine(device, threads)
    loaded = Checkpoint.load(find_checkpoint(checkpoint))
    source = text or loaded.text
    tokens = encode_lines(loaded.tokenizer, open_corpus(source).lines(split))
    rows = windows(tokens, batch_size, loaded.context if bptt is None else bptt)
    started = time.perf_counter()
    value = perplexity(loaded.model.to(device), rows)
    speed = rows.rows.numel() / (time.perf_counter() - started)
    print_table(
        console(),
        f"{source}, {split}",
        ("perplexity", "tokens", "tokens/s"),
        [(f"{value:.2f}", f"{tokens.numel():,}", f"{speed:,.0f}")],
    )
