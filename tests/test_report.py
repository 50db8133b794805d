"""The benchmark report reads what pytest-benchmark writes, and keeps the losses."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)

RUN = {
    "datetime": "2026-11-23T10:00:00",
    "commit_info": {"id": "0123456789abcdef"},
    "machine_info": {"llmos_fast": {"CPU": "a CPU", "torch": "2.13.0", "threads": "2"}},
    "benchmarks": [
        {
            "name": "bench_linear[a]",
            "stats": {"median": 0.002},
            "extra_info": {"peers_ms": {"slow": 9.0, "fast": 1.0}, "share_of_limit": 0.5},
        },
        {
            "name": "bench_peak_memory[b]",
            "stats": {"median": 1.0},
            "extra_info": {
                "peak_mib": 100.0,
                "peers_peak_mib": {"torch.nn": 150.0},
                "ratio": 2 / 3,
            },
        },
    ],
}


def test_table_compares_with_the_fastest_peer_and_shows_losses():
    table = report.markdown(RUN)
    assert "| linear[a] | 2.000 ms | fast | 1.000 ms | 0.50x | 50 % |" in table
    assert "| peak_memory[b] | 100 MiB | torch.nn | 150 MiB | 1.50x |  |" in table
    assert "a CPU" in table


def test_engines_stand_side_by_side_with_their_errors():
    info = {
        "case": "int4",
        "share_of_limit": 0.5,
        "relative_error": {"ours": 0.09, "peer": 0.1},
        "left_out": {"absent": "not installed"},
    }
    times = {1: {"peer": 3.0}, 4: {}}
    entries = [
        {"extra_info": info | {"rows": rows, "peers_ms": ms}, "stats": {"median": 0.002}}
        for rows, ms in times.items()
    ]
    table = report.engines([*RUN["benchmarks"], *entries])
    assert "| int4, ms | M=1 | M=4 | relative error |" in table
    assert "| ours | 2.0000 | 2.0000 | 9.0e-02 |" in table
    assert "| peer | 3.0000 |  | 1.0e-01 |" in table
    assert "left out: absent (not installed)" in table


def test_other_files_are_refused(tmp_path):
    for text, message in (
        ("{", "must be JSON"),
        (json.dumps({}), "must come from --benchmark-json"),
    ):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.read(path)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(RUN, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
