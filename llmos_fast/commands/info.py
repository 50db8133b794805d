"""``llmos-fast info``."""

from __future__ import annotations

from llmos_fast.commands.terminal import console


def info() -> None:
    """Say which implementations run on this machine, and why the others do not."""
    from llmos_fast.info import report

    console().print(report(), markup=False)
