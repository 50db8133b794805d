"""Turn the JSON of a benchmark run into a Markdown table and a plot.

python -m benchmarks.report benchmarks/results/FILE.json             # the table, to stdout
python -m benchmarks.report benchmarks/results/FILE.json --engines    # not only the fastest peer
python -m benchmarks.report benchmarks/results/FILE.json --plot speedup.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """The parsed file; ValueError where it is not what ``--benchmark-json`` writes."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"report: {path} must be JSON, got {error}") from error
    if "benchmarks" not in report:
        raise ValueError(f"report: {path} must come from --benchmark-json, got no 'benchmarks'")
    return report


def _best_peer(info: dict[str, Any]) -> tuple[str, float] | None:
    """Or, where nobody else has such a thing, our own plain call."""
    baselines = {f"our {name}": ms for name, ms in info.get("baselines_ms", {}).items()}
    peers: dict[str, float] = info.get("peers_ms") or baselines
    return min(peers.items(), key=lambda peer: peer[1], default=None)


def rows(report: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """(case, ours, fastest peer, its time, ratio, share of the limit), losses included."""
    found = []
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        name = entry["name"].removeprefix("bench_")
        if "peak_mib" in info:
            (peer, peak), *_ = info["peers_peak_mib"].items()
            ours, theirs = f"{info['peak_mib']:.0f} MiB", f"{peak:.0f} MiB"
            found.append((name, ours, peer, theirs, f"{1 / info['ratio']:.2f}x", ""))
        elif (best := _best_peer(info)) is not None:
            peer, milliseconds = best
            ours = 1e3 * entry["stats"]["median"]
            share = f"{100 * info['share_of_limit']:.0f} %"
            ratio = f"{milliseconds / ours:.2f}x"
            found.append((name, f"{ours:.3f} ms", peer, f"{milliseconds:.3f} ms", ratio, share))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The machine, and a table with one line per case."""
    machine = report["machine_info"].get("llmos_fast", {})
    on_gpu = any(entry["extra_info"].get("device") == "cuda" for entry in report["benchmarks"])
    keys = ("GPU", "torch", "triton") if on_gpu else ("CPU", "torch", "threads")
    facts = ", ".join(f"{key} {machine[key]}" for key in keys if key in machine)
    lines = [
        f"{report['datetime'][:10]}, {facts}, commit {report['commit_info']['id'][:10]}",
        "",
        "| case | ours | fastest peer | its time | ours is faster by | of the machine's limit |",
        "|---|---:|---|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows(report)),
    ]
    return "\n".join(lines)


def engines(entries: list[dict[str, Any]]) -> str:
    """A table for every weight: milliseconds of all engines for M rows, and their errors."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if "case" in entry["extra_info"]:
            cases.setdefault(entry["extra_info"]["case"], []).append(entry)
    lines = []
    for case, columns in cases.items():
        infos = [column["extra_info"] for column in columns]
        times = [
            {"ours": 1e3 * column["stats"]["median"]}
            | column["extra_info"].get("baselines_ms", {})
            | column["extra_info"]["peers_ms"]
            for column in columns
        ]
        errors = {name: e for info in infos for name, e in info["relative_error"].items()}
        heads = [f"M={info['rows']}" for info in infos]
        lines += ["", f"| {case}, ms | {' | '.join(heads)} | relative error |"]
        lines += ["|---|" + "---:|" * (len(heads) + 1)]
        for name, error in errors.items():
            cells = [f"{column[name]:.4f}" if name in column else "" for column in times]
            lines.append(f"| {name} | {' | '.join(cells)} | {error:.1e} |")
        shares = [f"{100 * info['share_of_limit']:.0f} %" for info in infos]
        lines.append(f"| ours, of the machine's limit | {' | '.join(shares)} | |")
        left_out = {name: why for info in infos for name, why in info["left_out"].items()}
        lines += ["", *(f"left out: {name} ({why})" for name, why in left_out.items())]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the speed-up over the fastest peer, one per case. Needs the ``[plot]`` extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('report: --plot needs matplotlib: pip install -e ".[plot]"') from error
    cases = rows(report)
    figure = Figure(figsize=(9, 1 + 0.22 * len(cases)), layout="constrained")
    axes = figure.subplots()
    axes.barh([case[0] for case in cases], [float(case[4].rstrip("x")) for case in cases])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the fastest peer")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Read the arguments, print the table, draw where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--engines", action="store_true", help="also all engines where many are")
    parser.add_argument("--plot", type=Path, help="also draw the ratios to this PNG")
    arguments = parser.parse_args()
    report = read(arguments.json)
    print(markdown(report))
    if arguments.engines:
        print(engines(report["benchmarks"]))
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
