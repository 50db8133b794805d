"""``llmos-fast evaluate``."""

from __future__ import annotations

import time
from typing import Annotated

from typer import Option

from llmos_fast.commands.opened import open_model
from llmos_fast.commands.options import (
    DEFAULT_DEVICE,
    AnyModel,
    Device,
    GroupSize,
    Scheme,
    Threads,
    use_machine,
)
from llmos_fast.commands.terminal import console, print_table
from llmos_fast.data import encode_lines, open_corpus, windows
from llmos_fast.models import LanguageModel
from llmos_fast.training import perplexity

_DEFAULT_TEXT, _DEFAULT_CONTEXT = "wikitext2", 256


def evaluate(
    checkpoint: AnyModel,
    text: Annotated[
        str | None,
        Option(help="Text as for train; without it, the text of the training, or wikitext2."),
    ] = None,
    split: Annotated[str, Option(help="train, valid or test.")] = "valid",
    batch_size: Annotated[int, Option(help="Rows read side by side.")] = 10,
    bptt: Annotated[
        int | None,
        Option(help="Tokens the model sees at once; without it, as in training, or 256."),
    ] = None,
    scheme: Scheme = None,
    group_size: GroupSize = 32,
    device: Device = DEFAULT_DEVICE,
    threads: Threads = 0,
) -> None:
    """Measure a model's perplexity on held-out text."""
    use_machine(device, threads)
    opened = open_model(checkpoint, scheme, group_size)
    if not isinstance(opened.model, LanguageModel):
        raise ValueError(f"evaluate needs a language model, got a {type(opened.model).__name__}")
    source = text or opened.text or _DEFAULT_TEXT
    tokens = encode_lines(opened.tokenizer, open_corpus(source).lines(split))
    rows = windows(tokens, batch_size, bptt or opened.context or _DEFAULT_CONTEXT)
    started = time.perf_counter()
    value = perplexity(opened.model.to(device), rows)
    speed = rows.rows.numel() / (time.perf_counter() - started)
    print_table(
        console(),
        f"{source}, {split}",
        ("perplexity", "tokens", "tokens/s"),
        [(f"{value:.2f}", f"{tokens.numel():,}", f"{speed:,.0f}")],
    )
