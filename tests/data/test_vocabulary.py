import json

import pytest

from llmos_fast.data import Vocabulary, build_vocab, preprocess_text

LINES = ["The cat saw the dog .", "", "the cat ran <unk>"]


def test_preprocess_text():
    text = "Don't STOP -- it's <unk> @-@ the 3rd Größe, under_score; 日本"
    expected = ["don't", "stop", "it's", "<unk>", "the", "3rd", "größe", "under", "score", "日本"]
    assert preprocess_text(text) == expected


def test_build_vocab_orders_by_frequency_then_appearance():
    vocabulary = build_vocab(LINES)
    assert vocabulary.words == ["<unk>", "<eos>", "the", "cat", "saw", "dog", "ran"]


def test_build_vocab_whitespace_keeps_case_and_signs():
    vocabulary = build_vocab(LINES, splitter="whitespace")
    assert vocabulary.words[:4] == ["<unk>", "<eos>", "cat", "the"]
    assert {"The", "."} <= set(vocabulary.words)


def test_build_vocab_minimum_count():
    assert build_vocab(LINES, min_count=2).words == ["<unk>", "<eos>", "the", "cat"]


@pytest.mark.parametrize("lines", [[], ["", "  "], ["--", "!"]], ids=["none", "blank", "signs"])
def test_build_vocab_refuses_empty_text(lines):
    with pytest.raises(ValueError, match="at least one word"):
        build_vocab(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"min_count": 0}, "min_count must be at least 1, got 0"), ({"splitter": "x"}, "got 'x'")],
    ids=["min_count", "splitter"],
)
def test_build_vocab_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_vocab(LINES, **arguments)


def test_encode_decode_round_trip():
    vocabulary = build_vocab(LINES)
    text = "the cat saw the dog"
    assert vocabulary.decode(vocabulary.encode(text)) == text
    two_lines = [*vocabulary.encode_line("the cat"), *vocabulary.encode_line("the dog")]
    assert vocabulary.decode(two_lines) == "the cat\nthe dog\n"


def test_unknown_word_policy():
    vocabulary = build_vocab(LINES)
    assert vocabulary.encode("the zebra") == [2, vocabulary.unknown_id]
    with pytest.raises(ValueError, match="'zebra' is not one of the 7 known words"):
        vocabulary.encode("the zebra", unknown="raise")
    with pytest.raises(ValueError, match="unknown must be 'map' or 'raise'"):
        vocabulary.encode("the", unknown="skip")


@pytest.mark.parametrize("index", [-1, 7], ids=str)
def test_decode_refuses_ids_outside(index):
    with pytest.raises(ValueError, match=rf"0\.\.6, got {index}"):
        build_vocab(LINES).decode([index])


def test_save_load(tmp_path):
    vocabulary = build_vocab([*LINES, "größe 日本"], splitter="whitespace")
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert (loaded.words, loaded.splitter) == (vocabulary.words, "whitespace")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "other", "splitter": "words", "words": []}']
    + [json.dumps({"format": "llmos_fast.vocabulary", "splitter": "words", "words": w}) for w in (
        "abc", [1], ["<unk>"], ["<unk>", "<eos>", "a", "a"])],
)  # fmt: skip
def test_load_refuses_other_files(tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match="Vocabulary"):
        Vocabulary.load(tmp_path / "v.json")
