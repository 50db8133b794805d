"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

from llmos_fast.training.logs import read_log


def require_matplotlib() -> None:
    """Raise ImportError where matplotlib is missing: better before a long run than after it."""
    if find_spec("matplotlib") is None:
        raise ImportError("the loss curve needs matplotlib: pip install llmos-fast[plot]")


def plot_loss(log: Path, picture: Path) -> None:
    """Draw training loss and validation loss of a CSV log into a PNG file.

    Raises ImportError where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log)
    measured = [r for r in records if r.valid_perplexity is not None]
    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.plot([r.step for r in records], [r.loss for r in records], label="training")
    if measured:
        losses = [math.log(r.valid_perplexity) for r in measured if r.valid_perplexity]
        axes.plot([r.step for r in measured], losses, "o-", label="validation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
