"""``llmos-fast train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from llmos_fast.checkpoints.storage import current_folder
from llmos_fast.commands.options import DEFAULT_DEVICE, Device, Threads, use_machine
from llmos_fast.commands.progress import train_on_screen
from llmos_fast.commands.terminal import console
from llmos_fast.training import (
    CsvLog,
    Log,
    ModelSettings,
    TensorBoardLog,
    TokenizerSettings,
    TrainingConfig,
    plot_loss,
    require_matplotlib,
    resume_run,
    start_run,
)

_MODEL = "Model"
_TOKENS = "Tokens"
_TRAINING = "Training"
# What a resumed run may be given; everything else is in its checkpoint.
_WITH_RESUME = {
    "resume",
    "epochs",
    "max_steps",
    "device",
    "threads",
    "log_every",
    "checkpoint_every",
    "tensorboard",
    "plot",
}


def train(
    context: typer.Context,
    text: Annotated[
        str,
        Argument(
            help="wikitext-2 (shipped), a text file, a folder, wikitext-103 or hf:owner/name."
        ),
    ] = "wikitext-2",
    output: Annotated[Path, Option(help="Folder of the run.")] = Path("runs/train"),
    resume: Annotated[
        Path | None, Option(help="Go on with the run in this folder, exactly where it stopped.")
    ] = None,
    tokenizer: Annotated[
        str,
        Option(
            help="words (lower-cased, special characters stripped), whitespace or bpe.",
            rich_help_panel=_TOKENS,
        ),
    ] = "words",
    min_count: Annotated[
        int, Option(help="Rarer words become <unk>.", rich_help_panel=_TOKENS)
    ] = 1,
    vocabulary_size: Annotated[
        int, Option(help="Largest number of tokens of bpe.", rich_help_panel=_TOKENS)
    ] = 8192,
    emsize: Annotated[int, Option(help="Width of the model.", rich_help_panel=_MODEL)] = 200,
    nhead: Annotated[int, Option(help="Attention heads.", rich_help_panel=_MODEL)] = 2,
    nhid: Annotated[int, Option(help="Feed-forward width.", rich_help_panel=_MODEL)] = 200,
    nlayers: Annotated[int, Option(help="Layers.", rich_help_panel=_MODEL)] = 2,
    dropout: Annotated[float, Option(help="Dropout.", rich_help_panel=_MODEL)] = 0.2,
    epochs: Annotated[int, Option(help="Passes over the text.", rich_help_panel=_TRAINING)] = 3,
    max_steps: Annotated[
        int, Option(help="Stop after this many steps; 0: never.", rich_help_panel=_TRAINING)
    ] = 0,
    batch_size: Annotated[
        int, Option(help="Rows read side by side.", rich_help_panel=_TRAINING)
    ] = 20,
    bptt: Annotated[
        int, Option(help="Tokens of each row in a step.", rich_help_panel=_TRAINING)
    ] = 35,
    optimizer: Annotated[
        str, Option(help="adamw, adam or sgd.", rich_help_panel=_TRAINING)
    ] = "adamw",
    lr: Annotated[float, Option(help="Learning rate.", rich_help_panel=_TRAINING)] = 1e-3,
    weight_decay: Annotated[float, Option(help="Weight decay.", rich_help_panel=_TRAINING)] = 0.01,
    schedule: Annotated[
        str, Option(help="constant, step or inverse_sqrt.", rich_help_panel=_TRAINING)
    ] = "constant",
    warmup_steps: Annotated[
        int, Option(help="Warm-up of inverse_sqrt.", rich_help_panel=_TRAINING)
    ] = 4000,
    decay: Annotated[
        float, Option(help="Factor of the step schedule.", rich_help_panel=_TRAINING)
    ] = 0.95,
    decay_every: Annotated[
        int, Option(help="Steps between two of its decays.", rich_help_panel=_TRAINING)
    ] = 1000,
    clip: Annotated[
        float, Option(help="Largest gradient norm; 0: no clipping.", rich_help_panel=_TRAINING)
    ] = 0.5,
    accumulation: Annotated[
        int,
        Option(help="Parts in which a step's rows are computed.", rich_help_panel=_TRAINING),
    ] = 1,
    precision: Annotated[
        str, Option(help="float32 or bfloat16 (autocast).", rich_help_panel=_TRAINING)
    ] = "float32",
    seed: Annotated[int, Option(help="Of weights and dropout.", rich_help_panel=_TRAINING)] = 1,
    device: Device = DEFAULT_DEVICE,
    threads: Threads = 0,
    log_every: Annotated[int, Option(help="Steps between two log lines.", min=1)] = 100,
    checkpoint_every: Annotated[
        int, Option(help="Steps between two checkpoints; 0: only after each epoch.", min=0)
    ] = 1000,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Log for TensorBoard too.")] = False,
    plot: Annotated[bool, Option("--plot", help="Draw the loss curve as loss.png.")] = False,
) -> None:
    """Train a word language model on a text, or go on with a run that was stopped."""
    use_machine(device, threads)
    if plot:
        require_matplotlib()
    out = console()
    given = _given(context)
    if resume is not None:
        if unexpected := sorted(given - _WITH_RESUME):
            option = unexpected[0].replace("_", "-")
            raise ValueError(f"{option} cannot be combined with --resume: the run's own is kept")
        run = resume_run(
            resume,
            device,
            epochs=epochs if "epochs" in given else None,
            max_steps=max_steps if "max_steps" in given else None,
        )
        out.print(f"Going on after step {run.trainer.steps_done} of {run.trainer.total_steps}")
    else:
        _refuse_to_overwrite(output)
        run = start_run(
            output,
            text,
            TokenizerSettings(tokenizer, min_count, vocabulary_size),
            ModelSettings(emsize, nhead, nhid, nlayers, dropout),
            TrainingConfig(
                batch_size=batch_size,
                bptt=bptt,
                epochs=epochs,
                max_steps=max_steps,
                optimizer=optimizer,
                learning_rate=lr,
                weight_decay=weight_decay,
                schedule=schedule,
                warmup_steps=warmup_steps,
                decay=decay,
                decay_every=decay_every,
                clip_norm=clip,
                accumulation=accumulation,
                precision=precision,
                seed=seed,
            ),
            device,
        )
        out.print(
            f"{len(run.checkpoint.tokenizer):,} tokens in the vocabulary, {run.size:,} weights"
        )
    logs: list[Log] = [CsvLog(run.log, run.trainer.steps_done)]
    if tensorboard:
        logs.append(TensorBoardLog(run.folder / "tensorboard"))
    train_on_screen(out, run, logs, log_every=log_every, checkpoint_every=checkpoint_every)
    if plot:
        plot_loss(run.log, run.folder / "loss.png")
    out.print(f"Saved in {run.checkpoint_folder}")


def _given(context: typer.Context) -> set[str]:
    """Names of the options that were on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _refuse_to_overwrite(output: Path) -> None:
    if current_folder(output / "checkpoint").exists():
        raise ValueError(
            f"{output} holds a run already: give --resume {output} or another --output"
        )
