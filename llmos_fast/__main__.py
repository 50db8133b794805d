"""``python -m llmos_fast``: which implementation runs here, and why the others do not."""

from rich.console import Console

from llmos_fast.info import report

if __name__ == "__main__":
    Console().print(report())
