import sys

import pytest

from llmos_fast.training import CsvLog, Record, TensorBoardLog, plot_loss, read_log

RECORDS = [
    Record(10, 1, 6.5, 0.001, 0.7, 1234.5),
    Record(20, 1, 5.25, 0.001, 0.1 + 0.2, 1200.0, 250.75),
    Record(30, 2, 5.0, 0.0005, 0.6, 1100.0),
]


@pytest.fixture
def log(tmp_path):
    written = CsvLog(tmp_path / "log.csv")
    for record in RECORDS:
        written.write(record)
    written.close()
    return tmp_path / "log.csv"


def test_csv_round_trip(log):
    assert read_log(log) == RECORDS


def test_a_resumed_run_drops_what_it_will_do_again(log):
    resumed = CsvLog(log, steps_done=20)
    resumed.write(RECORDS[2]._replace(loss=4.0))
    resumed.close()
    assert read_log(log) == [*RECORDS[:2], RECORDS[2]._replace(loss=4.0)]


def test_lines_are_on_disk_at_once(tmp_path):
    written = CsvLog(tmp_path / "log.csv")
    written.write(RECORDS[0])
    assert read_log(tmp_path / "log.csv") == RECORDS[:1]
    written.close()


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", "{header}\n1,2\n", "{header}\nx,1,1,1,1,1,\n"]
)
def test_read_log_refuses(tmp_path, content):
    (tmp_path / "log.csv").write_text(content.format(header=",".join(Record._fields)))
    with pytest.raises(ValueError, match="read_log"):
        read_log(tmp_path / "log.csv")


def test_missing_packages_are_named(tmp_path, monkeypatch, log):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"llmos-fast\[tensorboard\]"):
        TensorBoardLog(tmp_path)
    monkeypatch.setattr("llmos_fast.training.plot.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"llmos-fast\[plot\]"):
        plot_loss(log, tmp_path / "loss.png")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    written = TensorBoardLog(tmp_path)
    written.write(RECORDS[1])
    written.close()
    assert list(tmp_path.glob("events*"))


def test_plot(log, tmp_path):
    pytest.importorskip("matplotlib")
    plot_loss(log, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
