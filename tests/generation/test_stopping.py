import pytest

from llmos_fast.generation import StopTexts


def run(stop, pieces):
    """What is let through of each piece and of the end, and whether a stop string came."""
    stopping = StopTexts(stop)
    let = [stopping.push(piece) for piece in pieces]
    return [*let, stopping.flush()], stopping.stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "expected", "stopped"),
    [
        ([], ["a", "b"], ["a", "b", ""], False),
        (["xy"], ["a", "xyb", "c"], ["a", "", "", ""], True),
        (["xy"], ["ax", "yb"], ["a", "", ""], True),
        (["xy"], ["ax", "xy"], ["a", "x", ""], True),
        (["xy"], ["ax", "z"], ["a", "xz", ""], False),
        (["xy"], ["ax"], ["a", "x"], False),
        (["xyz"], ["x", "y", "x", "y", "z"], ["", "", "xy", "", "", ""], True),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (["long", "o"], ["l", "on", "g"], ["", "l", "", ""], True),
        (["long", "o"], ["long"], ["l", ""], True),
        (["b", "ab"], ["cab"], ["c", ""], True),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], True),
    ],
    ids=str,
)
def test_lets_through(stop, pieces, expected, stopped):
    assert run(stop, pieces) == (expected, stopped)


@pytest.mark.parametrize("size", range(1, 9))
def test_how_a_text_is_divided_makes_no_difference(size):
    text = "one two, one three; two one thr three twone"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for stop in (["three"], ["three;", "two one"], ["e t"], ["none"], ["two"], ["one three", "th"]):
        let, stopped = run(stop, pieces)
        one_by_one, expected = run(stop, text)
        assert ("".join(let), stopped) == ("".join(one_by_one), expected)
        assert stopped == any(s in text for s in stop)


def test_refuses_an_empty_string():
    with pytest.raises(ValueError, match=r"texts must not be empty, got \['a', ''\]"):
        StopTexts(["a", ""])
