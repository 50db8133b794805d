"""A training run on the screen: progress bar, logs, evaluation, checkpoints, interruption."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmos_fast.checkpoints.storage import current_folder
from llmos_fast.commands.interruption import Interruption
from llmos_fast.training import Log, Record, Run, Step, perplexity

INTERRUPTED = 130


class Meter:
    """Means over the steps since the last record."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._tokens = 0
        self._seconds = 0.0

    def add(self, step: Step, seconds: float) -> None:
        """Count one step."""
        self._losses.append(step.loss.item())
        self._tokens += step.tokens
        self._seconds += seconds

    @property
    def loss(self) -> float:
        """Mean training loss."""
        return sum(self._losses) / len(self._losses)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self._tokens / self._seconds

    def record(self, step: Step, valid_perplexity: float | None) -> Record:
        """These means as a log record."""
        return Record(
            step.number,
            step.epoch,
            self.loss,
            step.learning_rate,
            step.gradient_norm.item(),
            self.speed,
            valid_perplexity,
        )


class Display:
    """A progress bar on a terminal; elsewhere one plain line per record."""

    def __init__(self, out: Console, run: Run):
        self._out = out
        self._total = run.trainer.total_steps
        self._left = timedelta()
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=out,
            disable=not out.is_terminal,
        )
        self._task = self.bar.add_task(
            "train", total=self._total, completed=run.trainer.steps_done, epoch=1, loss=0, speed=0
        )

    def update(self, step: Step, meter: Meter) -> None:
        """Show the step that was just done."""
        self._left = timedelta(
            seconds=round((self._total - step.number) * step.tokens / meter.speed)
        )
        self.bar.update(
            self._task,
            completed=step.number,
            epoch=step.epoch,
            loss=meter.loss,
            speed=meter.speed,
        )

    def show(self, record: Record) -> None:
        """Print what was just logged where it would not be seen otherwise."""
        if record.valid_perplexity is not None:
            self._out.print(
                f"epoch {record.epoch}, step {record.step}: loss {record.loss:.3f}, "
                f"validation perplexity {record.valid_perplexity:.2f}"
            )
        elif not self._out.is_terminal:
            self._out.print(
                f"step {record.step}/{self._total}: loss {record.loss:.3f}, "
                f"{record.tokens_per_second:,.0f} tokens/s, {self._left} left"
            )


def train_on_screen(
    out: Console, run: Run, logs: Sequence[Log], *, log_every: int, checkpoint_every: int
) -> None:
    """Train ``run`` to its end.

    A checkpoint is saved every ``checkpoint_every`` steps (0: never), at the end of every epoch, at
    the end, and on Ctrl-C, which ends the command with status 130. Where the run stops early, the
    way to go on is printed.
    """
    try:
        finished = _train(out, run, logs, log_every, checkpoint_every)
    except KeyboardInterrupt:
        finished = False
    except OSError:
        out.print(_how_to_resume(run))
        raise
    finally:
        for log in logs:
            log.close()
    if not finished:
        out.print(f"Interrupted after step {run.trainer.steps_done}. {_how_to_resume(run)}")
        raise typer.Exit(INTERRUPTED)


def _train(
    out: Console, run: Run, logs: Sequence[Log], log_every: int, checkpoint_every: int
) -> bool:
    """Whether the training came to its end; Ctrl-C stops it at the end of a step."""
    display, meter = Display(out, run), Meter()
    with Interruption() as interruption, display.bar:
        started = time.perf_counter()
        for step in run.trainer.steps():
            meter.add(step, time.perf_counter() - started)
            display.update(step, meter)
            last = step.ends_epoch or step.number == run.trainer.total_steps
            if last or step.number % log_every == 0:
                measured = perplexity(run.checkpoint.model, run.held_out) if last else None
                record, meter = meter.record(step, measured), Meter()
                display.show(record)
                for log in logs:
                    log.write(record)
            due = checkpoint_every and step.number % checkpoint_every == 0
            if last or due or interruption.requested:
                run.save()
            if interruption.requested:
                return step.number == run.trainer.total_steps
            started = time.perf_counter()
    return True


def _how_to_resume(run: Run) -> str:
    if not current_folder(run.checkpoint_folder).exists():
        return "No checkpoint was saved yet."
    return (
        f"The last good checkpoint is {run.checkpoint_folder}; go on with: "
        f"llmos-fast train --resume {run.folder}"
    )
