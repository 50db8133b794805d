"""What the commands print with: coloured on a terminal, plain lines in a pipe or a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """A console on the present standard output."""
    return Console(highlight=False, soft_wrap=True)


def print_table(
    out: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print a table, the first column to the left and the others to the right."""
    out.print(f"[bold]{title}[/bold]")
    table = Table(box=box.ROUNDED if out.is_terminal else None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print()


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:.1f} MB"
