"""The ``llmos-fast`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from llmos_fast.commands.chat import chat
from llmos_fast.commands.evaluate import evaluate
from llmos_fast.commands.generate import generate
from llmos_fast.commands.info import info
from llmos_fast.commands.quantize import quantize
from llmos_fast.commands.quickstart import quickstart
from llmos_fast.commands.train import train

app = typer.Typer(
    name="llmos-fast",
    help="Train, evaluate, quantize and run Transformer language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (quickstart, train, evaluate, generate, chat, quantize, info):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``arguments``, by default those of the process, and exit.

    Bad input, missing files and a full disk end with one line on standard error and status 1, a
    wrong command line with status 2, Ctrl-C with status 130.
    """
    try:
        app(args=arguments)
    except (ValueError, ImportError) as error:
        _fail(str(error))
    except OSError as error:
        described = error.strerror and error.filename
        _fail(f"{error.filename}: {error.strerror}" if described else str(error))


def _fail(message: str) -> None:
    print(f"llmos-fast: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
