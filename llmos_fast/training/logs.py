"""Where the numbers of a run are kept: a CSV file, and TensorBoard where it is asked for."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple, Protocol


class Record(NamedTuple):
    """One line of a log; ``valid_perplexity`` is None where none was measured."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    valid_perplexity: float | None = None


class Log(Protocol):
    """Keeps records."""

    def write(self, record: Record) -> None:
        """Keep one record."""

    def close(self) -> None:
        """Write out what is still in memory."""


class CsvLog:
    """One line per record, flushed at once.

    steps_done: where a run is resumed, what the file says about later steps is dropped
    """

    def __init__(self, path: Path, steps_done: int = 0):
        kept = [row for row in read_log(path) if row.step <= steps_done] if path.exists() else []
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(Record._fields)
        for record in kept:
            self.write(record)

    def write(self, record: Record) -> None:
        """Append one line."""
        self._writer.writerow(record)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """Scalars for TensorBoard. Raises ImportError where the package is missing."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard logs need the tensorboard package: pip install llmos-fast[tensorboard]"
            ) from error
        self._writer = SummaryWriter(folder)

    def write(self, record: Record) -> None:
        """Add one point to each curve."""
        for name, value in record._asdict().items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Write out what is still in memory."""
        self._writer.close()


def read_log(path: Path) -> list[Record]:
    """Records of a CSV log. Raises ValueError where the file is anything else."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != Record._fields:
        raise ValueError(f"read_log: {path} must start with {','.join(Record._fields)}")
    try:
        return [_record(row) for row in rows[1:]]
    except (ValueError, TypeError) as error:
        raise ValueError(f"read_log: {path} is damaged: {error}") from error


def _record(row: list[str]) -> Record:
    step, epoch, loss, rate, norm, speed, perplexity = row
    return Record(
        int(step),
        int(epoch),
        float(loss),
        float(rate),
        float(norm),
        float(speed),
        float(perplexity) if perplexity else None,
    )
