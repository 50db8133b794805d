"""Cost of a token in training against the sequences' length, the batch and the threads, as a PNG.

pytest benchmarks/ --benchmark-only -k "scaling or threads" --benchmark-json=out.json
python -m benchmarks.plot_scaling out.json scaling.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument

from llmos_fast.training import require_matplotlib

from . import report

AXES = {
    "seq": "T, with {tokens} tokens in a step",
    "batch": "batch, T = {seq}",
    "threads": "threads, T = {seq}, batch {batch}",
}
COLOURS = {"ours": "tab:blue", "torch.nn": "tab:orange"}
STYLES = {"float32": "-", "bfloat16": "--"}

Curves = dict[tuple[str, str], list[tuple[int, float]]]


def curves(entries: list[dict[str, Any]], along: str) -> Curves:
    """By (engine, dtype) its points: what varies, and microseconds of a token."""
    found: Curves = {}
    for entry in entries:
        info = entry["extra_info"]
        scaling = info["scaling"]
        tokens = scaling["seq"] * scaling["batch"]
        times = {"ours": 1e3 * entry["stats"]["median"]} | info["peers_ms"]
        for engine, milliseconds in times.items():
            point = scaling[along], 1e3 * milliseconds / tokens
            found.setdefault((engine, info["dtype"]), []).append(point)
    return {key: sorted(points) for key, points in found.items()}


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """One panel for each thing that was varied."""
    require_matplotlib()
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        panels.setdefault(entry["extra_info"]["scaling"]["along"], []).append(entry)
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (along, cases) in zip(all_axes, panels.items(), strict=True):
        for (engine, dtype), points in curves(cases, along).items():
            style = {"color": COLOURS[engine], "linestyle": STYLES[dtype], "marker": "o"}
            axes.plot(*zip(*points, strict=True), label=f"{engine}, {dtype}", **style)
        scaling = cases[0]["extra_info"]["scaling"]
        tokens = scaling["seq"] * scaling["batch"]
        axes.set_xlabel(AXES[along].format(tokens=tokens, **scaling))
        values = sorted({case["extra_info"]["scaling"][along] for case in cases})
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("microseconds of a training step, per token")
    all_axes[0].legend()
    figure.savefig(path, dpi=120)


def main(
    json: Annotated[Path, Argument(help="What --benchmark-json wrote.")],
    picture: Annotated[Path, Argument(help="The PNG to write.")],
) -> None:
    """Draw what a run of bench_training.py has measured."""
    entries = [e for e in report.read(json)["benchmarks"] if "scaling" in e["extra_info"]]
    if not entries:
        raise ValueError(f"plot_scaling: {json} must hold cases of bench_training.py, got none")
    plot(entries, picture)


if __name__ == "__main__":
    typer.run(main)
