import pytest

from llmos_fast.data import BytePairTokenizer, train_byte_pair

LINES = ["the cat saw the dog", "the cat ran", "größe"]
AWKWARD = "Ünïcode 日本 \t two  spaces \U0001f600"


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_pair(LINES, 270)


def test_any_text_round_trips(tokenizer):
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD


def test_learns_pairs(tokenizer):
    assert 257 < len(tokenizer) <= 270
    assert len(tokenizer.encode("the cat")) < len("the cat")


def test_lines_end_with_the_marker(tokenizer):
    ids = [*tokenizer.encode_line("the cat"), *tokenizer.encode_line("ran")]
    assert ids.count(tokenizer.end_id) == 2
    assert tokenizer.decode(ids) == "the cat\nran\n"


def test_save_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "bpe.json")
    loaded = BytePairTokenizer.load(tmp_path / "bpe.json")
    assert len(loaded) == len(tokenizer)
    assert loaded.encode(AWKWARD) == tokenizer.encode(AWKWARD)


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}'], ids=["empty", "object", "wrong"])
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "bpe.json").write_text(content)
    with pytest.raises(ValueError, match="is not a tokenizer"):
        BytePairTokenizer.load(tmp_path / "bpe.json")


def test_refuses(tokenizer):
    with pytest.raises(ValueError, match="at least 257, got 256"):
        train_byte_pair(LINES, 256)
    with pytest.raises(ValueError, match="decode: ids must be in"):
        tokenizer.decode([len(tokenizer)])
