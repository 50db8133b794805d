"""``llmos-fast quickstart``: the whole job on one small model, in minutes."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from llmos_fast.commands.options import Threads, use_machine
from llmos_fast.commands.progress import train_on_screen
from llmos_fast.commands.quantize import save_quantized, weights_size
from llmos_fast.commands.terminal import console, megabytes, print_table
from llmos_fast.commands.torch_peer import TorchTransformerModel
from llmos_fast.generation import Sampling, generate_text
from llmos_fast.models import LanguageModel
from llmos_fast.training import (
    Checkpoint,
    CsvLog,
    ModelSettings,
    Run,
    TokenizerSettings,
    Trainer,
    TrainingConfig,
    perplexity,
    start_run,
)

_MODEL = ModelSettings(ninp=128, nhead=4, nhid=256, nlayers=2, dropout=0.1)
_MIN_COUNT = 10
_GROUP_SIZE = 64
_TIMED_STEPS = 16


def quickstart(
    output: Annotated[Path, Option(help="Folder of the run; replaced.")] = Path("runs/quickstart"),
    steps: Annotated[int, Option(help="Training steps.", min=1)] = 1000,
    prompt: Annotated[str, Option(help="Text to continue.")] = "the game was",
    seed: Annotated[int, Option(help="The same seed and threads give the same model.")] = 1,
    threads: Threads = 0,
) -> None:
    """Train, evaluate, quantize and generate on WikiText-2, then compare speed with torch.nn."""
    use_machine("cpu", threads)
    out = console()
    started = time.perf_counter()
    config = TrainingConfig(learning_rate=2e-3, max_steps=steps, seed=seed)
    run = start_run(output, "wikitext-2", TokenizerSettings(min_count=_MIN_COUNT), _MODEL, config)
    out.print(
        f"WikiText-2: {len(run.checkpoint.tokenizer):,} words in the vocabulary, "
        f"{run.trainer.text.rows.numel():,} tokens; a model of {run.size:,} weights"
    )
    train_on_screen(out, run, [CsvLog(run.log)], log_every=100, checkpoint_every=0)
    out.print(f"Saved in {run.checkpoint_folder}\n")
    _compare_formats(out, run)
    _continue_prompt(out, run.checkpoint, prompt, seed)
    _compare_with_torch(out, run)
    out.print(f"Done in {time.perf_counter() - started:.0f} s")


def _compare_formats(out: Console, run: Run) -> None:
    """Perplexity, size and speed of the model as it was trained, in int8 and in int4."""
    rows = [_format_row("float32", run.checkpoint, run.checkpoint_folder, run)]
    for scheme in ("int8", "int4"):
        folder = run.folder / f"checkpoint-{scheme}"
        fresh = Checkpoint.load(run.checkpoint_folder)
        quantized = save_quantized(fresh, scheme, _GROUP_SIZE, folder)
        rows.append(_format_row(scheme, quantized, folder, run))
    columns = ("weights", "validation perplexity", "size", "tokens/s read")
    print_table(out, "Quantization of the linear layers", columns, rows)


def _format_row(name: str, checkpoint: Checkpoint, folder: Path, run: Run) -> tuple[str, ...]:
    started = time.perf_counter()
    value = perplexity(checkpoint.model, run.held_out)
    speed = run.held_out.rows.numel() / (time.perf_counter() - started)
    return name, f"{value:.2f}", megabytes(weights_size(folder)), f"{speed:,.0f}"


def _continue_prompt(out: Console, checkpoint: Checkpoint, prompt: str, seed: int) -> None:
    text = generate_text(
        checkpoint.model,
        checkpoint.tokenizer,
        prompt,
        40,
        sampling=Sampling(temperature=0.8, top_k=40),
        seed=seed,
        context=checkpoint.context,
    )
    out.print("[bold]Generated[/bold]")
    # Every other line of WikiText is blank, and the model learns it.
    lines = [line for line in text.splitlines() if line]
    out.print("\n".join(lines) + "\n", markup=False)


def _compare_with_torch(out: Console, run: Run) -> None:
    """Time of the same training steps on our layers and on torch.nn's."""
    ours = Checkpoint.load(run.checkpoint_folder).model
    peer = TorchTransformerModel(**ours.arguments)
    peer.load_state_dict(ours.state_dict())
    models: dict[str, LanguageModel] = {"torch.nn": peer, "llmos_fast": ours}
    config = replace(run.trainer.config, max_steps=_TIMED_STEPS)
    steps = {name: Trainer(m, run.trainer.text, config).steps() for name, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(_TIMED_STEPS):
        for name in models:
            started = time.perf_counter()
            next(steps[name])
            seconds[name].append(time.perf_counter() - started)
    # The first step of each also allocates the optimizer's state.
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    tokens = config.batch_size * config.bptt
    rows = [
        (
            name,
            f"{median * 1e3:.1f} ms",
            f"{tokens / median:,.0f}",
            f"{medians['torch.nn'] / median:.2f}x",
        )
        for name, median in medians.items()
    ]
    title = f"The same training step, median of {_TIMED_STEPS - 1}, interleaved"
    print_table(out, title, ("layers", "time", "tokens/s", "speed"), rows)
