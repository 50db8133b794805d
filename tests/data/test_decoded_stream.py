import pytest

from llmos_fast.data import build_vocab, train_byte_pair
from llmos_fast.data.decoded_stream import DecodedStream

TEXT = ["der Bär frißt 🍯 und schläft", "日本語"]


def pieces(stream, ids):
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("text", TEXT)
def test_byte_pairs(text):
    tokenizer = train_byte_pair(["a b c"], 300)
    ids = tokenizer.encode(text)
    found = pieces(tokenizer.stream(), ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(found)
    assert "" in found[:-1]  # in the middle of a character


def test_words():
    vocabulary = build_vocab(["red green blue"])
    ids = vocabulary.encode("red blue green red")
    found = pieces(vocabulary.stream(), ids)
    assert "".join(found) == vocabulary.decode(ids)
    assert all(found[:-1])


def test_an_unfinished_character_comes_at_the_end():
    stream = DecodedStream(lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert pieces(stream, [65, 0xF0, 0x9F]) == ["A", "", "", "\ufffd"]
    stream = DecodedStream(lambda ids: bytes(ids).decode("utf-8", "replace"))
    assert pieces(stream, [65, 0xC3, 0xA4, 66]) == ["A", "", "ä", "B", ""]


def test_nothing():
    assert DecodedStream(lambda ids: "never asked").flush() == ""
