import pytest
import torch

from llmos_fast.data import batchify, windows


def test_batchify_by_hand():
    rows = batchify(torch.arange(11), 3)
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_batchify_is_a_view():
    tokens = torch.arange(11)
    assert batchify(tokens, 3).data_ptr() == tokens.data_ptr()


def test_windows_by_hand():
    text = windows(torch.arange(12, dtype=torch.int32), batch_size=2, bptt=2)
    assert len(text) == 3
    seen = [(data.tolist(), targets.tolist()) for data, targets in text]
    assert seen == [
        ([[0, 1], [6, 7]], [[1, 2], [7, 8]]),
        ([[2, 3], [8, 9]], [[3, 4], [9, 10]]),
        ([[4], [10]], [[5], [11]]),
    ]
    assert all(t.dtype == torch.int64 for pair in text for t in pair)


@pytest.mark.parametrize("bptt", [1, 2, 3, 4, 5, 9], ids=str)
def test_every_target_is_read_once(bptt):
    tokens = torch.arange(15)
    targets = torch.cat([targets for _, targets in windows(tokens, 3, bptt)], dim=1)
    assert torch.equal(targets, tokens.view(3, 5)[:, 1:])


@pytest.mark.parametrize(
    ("count", "batch_size", "bptt", "message"),
    [
        (5, 3, 2, "at least 2 for each of 3 rows, got 5"),
        (0, 1, 2, "got 0"),
        (9, 0, 2, "batch_size must be at least 1, got 0"),
        (9, 2, 0, "bptt must be at least 1, got 0"),
    ],
    ids=str,
)
def test_refuses(count, batch_size, bptt, message):
    with pytest.raises(ValueError, match=message):
        windows(torch.arange(count), batch_size, bptt)


def test_refuses_rows():
    with pytest.raises(ValueError, match=r"1 dimension, got shape \(2, 2\)"):
        batchify(torch.zeros(2, 2), 1)
