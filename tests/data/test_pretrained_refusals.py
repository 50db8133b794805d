"""What published tokenizers refuse: files that are damaged, hostile or of other kinds."""

import json
import struct

import pytest
from tokenizers import Tokenizer, decoders, models

from llmos_fast.data import PretrainedTokenizer


def test_refuses_arguments(words):
    for arguments, message in [
        ({"begin_id": 7}, "begin_id must be in 0..6, got 7"),
        ({"end_ids": [-1]}, "end_ids must be in 0..6, got -1"),
        ({"pad_id": 1 << 40}, "pad_id must be in"),
        ({"adds_begin": True}, "adds_begin needs a begin_id"),
    ]:
        with pytest.raises(ValueError, match=message):
            PretrainedTokenizer(words, **arguments)
    with pytest.raises(ValueError, match="ids must be distinct"):
        PretrainedTokenizer(Tokenizer(models.BPE()))
    tokenizer = PretrainedTokenizer(words)
    for index in (-1, 7, 1 << 40):
        with pytest.raises(ValueError, match=r"decode: ids must be in 0\.\.6"):
            tokenizer.decode([index])
    with pytest.raises(ValueError, match="must be 'map' or 'raise'"):
        tokenizer.encode("hi", "keep")
    for text in ("\ud800", None):
        with pytest.raises(ValueError, match="encode: text must be a whole str"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (decoders.CTC(), "CTC"),
        (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "")]), "Replace"),
    ],
    ids=["ctc", "suffix", "each-strip", "end-strip", "late-replace"],
)
def test_refuses_decoders(words, decoder, named):
    words.decoder = decoder
    with pytest.raises(ValueError, match=f"decoder must be .* got {named}"):
        PretrainedTokenizer(words)


def llama2c(tokens, longest=9):
    raw = struct.pack("<i", longest)
    for token, score in tokens:
        raw += struct.pack("<fi", score, len(token)) + token
    return raw


START = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]


def test_llama2c_without_bytes(tmp_path):
    tokens = [(b" ", 0.0), (b"a", 0.0), (b"b", 0.0), (b" a", -1.0), (b"ab", -2.0)]
    (tmp_path / "tok.bin").write_bytes(llama2c([*START, *tokens]))
    tokenizer = PretrainedTokenizer.load(tmp_path)
    assert tokenizer.encode("abab?") == [1, 6, 5, 7, 0]


def test_llama2c_merges_by_score_not_by_place(tmp_path):
    letters = [(letter, 0.0) for letter in (b"a", b"b", b"c")]
    for scores, expected in (((-1.0, -2.0), [6, 5]), ((-2.0, -1.0), [3, 7])):
        pairs = zip((b"ab", b"bc"), scores, strict=True)
        (tmp_path / "tok.bin").write_bytes(llama2c([*START, *letters, *pairs]))
        tokenizer = PretrainedTokenizer.load(tmp_path)
        assert tokenizer.encode("abc", special=False) == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "longest token must have"),
        (llama2c([], longest=-1), "longest token must have"),
        (llama2c([], longest=1 << 30), "longest token must have"),
        (llama2c(START)[:-3], "token 2 is cut off"),
        (llama2c(START) + b"\0\0", "token 3 is cut off"),
        (llama2c(START) + struct.pack("<fi", 0, -5), r"token 3 must have 1\.\.9 bytes, got -5"),
        (llama2c(START) + struct.pack("<fi", 0, 0), "must have 1"),
        (llama2c(START) + struct.pack("<fi", 0, 1 << 30), "must have 1"),
        (llama2c([*START, (b"a", 0.0), (b"a", 0.0)]), "must be distinct, got 'a'"),
        (llama2c([*START, (b"\xff", 0.0)]), "token 3 must be UTF-8"),
        (llama2c([*START, (b"a", float("nan"))]), "scores must be finite"),
        (llama2c([(b"a", 0.0)]), "first tokens must be <unk>"),
        (
            llama2c([*START, (b"a", 0.0), (b"b", 0.0), (b"ab", -1.0), (b"ba", -1.0)]),
            "must have distinct scores",
        ),
    ],
)
def test_refuses_llama2c_files(tmp_path, raw, message):
    path = tmp_path / "tok.bin"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as refused:
        PretrainedTokenizer.load(path)
    assert str(path) in str(refused.value)


# a normalizer whose map of letters is a number: 1 << 40 bytes, were it taken for a length
HUGE = b"\x1a\x07\x10\x80\x80\x80\x80\x80\x20"


@pytest.mark.parametrize(
    "raw", [b"", b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x0f", b"\x08\x01", b"hi", HUGE]
)
def test_refuses_other_sentencepiece_files(tmp_path, raw):
    (tmp_path / "tok.model").write_bytes(raw)
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        PretrainedTokenizer.load(tmp_path)


GOOD = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ("[]", "", "must hold a JSON object"),
        ("{", "", "is not a JSON file"),
        ("[" * 100_000, "", "is not a JSON file"),
        ('{"a": 0, "a": 1}', "", "names must be distinct, got 'a'"),
        (json.dumps({"a": 0, "b": 2}), "", "ids must be 0..1, each once"),
        (json.dumps({"a": 0, "b": 0}), "", "ids must be 0..1, each once"),
        (json.dumps({"a": -1}), "", "ids must be 0..0"),
        (json.dumps({"a": 1 << 70}), "", "ids must be 0..0"),
        (json.dumps({"a": "0"}), "", "ids must be whole numbers"),
        (json.dumps(GOOD), "#version: 0.2\na b\nb a", "merges.txt: line 3 must be two tokens"),
        (json.dumps(GOOD), "ab", "merges.txt: line 1 must be two tokens"),
        (json.dumps(GOOD), None, "merges.txt cannot be read"),
    ],
)
def test_refuses_byte_level_files(tmp_path, vocabulary, merges, message):
    (tmp_path / "vocab.json").write_text(vocabulary)
    if merges is not None:
        (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ValueError, match=message) as refused:
        PretrainedTokenizer.load(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[UNK]\n[CLS]\na\na\n[SEP]", "tokens must be distinct, got 'a'"),
        (b"[UNK]\n[CLS]\n", r"must hold \[SEP\]"),
        (b"\xff", "must be UTF-8"),
    ],
)
def test_refuses_word_piece_files(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PretrainedTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"model": 3}', '{"a": 1, "a": 1}', "\x00"], ids=repr
)
def test_refuses_other_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        PretrainedTokenizer.load(tmp_path)


def test_refuses_a_tokenizer_json_that_panics(words, tmp_path, write):
    content = json.loads(words.to_str())
    template = [{"SpecialToken": {"id": "<gone>", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": {},
    }
    write(tmp_path, tokenizer=content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        PretrainedTokenizer.load(tmp_path)


def test_refuses_ids_of_tokenizer_json(words, tmp_path, write):
    content = json.loads(words.to_str())
    for vocabulary in ({"?": 0, "a": 0}, {"?": 0, "a": 4294967295}, {"?": -1}, {"?": 1 << 40}):
        content["model"]["vocab"], content["added_tokens"] = vocabulary, []
        write(tmp_path, tokenizer=content)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            PretrainedTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config", {"eos_token": "<gone>"}, "eos_token must be in the vocabulary"),
        ("tokenizer_config", {"eos_token": 3}, "eos_token must be in the vocabulary"),
        ("generation_config", {"eos_token_id": [2, 7]}, "eos_token_id must be in .* got 7"),
        ("generation_config", {"eos_token_id": "x"}, "eos_token_id must be in .* got 'x'"),
        ("config", {"bos_token_id": 1 << 70}, "bos_token_id must be in"),
        ("tokenizer_config", {"add_bos_token": 1}, "add_bos_token must be true or false"),
        ("tokenizer_config", {"chat_template": 3}, "chat_template must be text"),
        ("tokenizer_config", {"chat_template": [3]}, "chat_template must name"),
        ("config", [], "must hold a JSON object"),
    ],
)
def test_refuses_settings(words, tmp_path, name, content, message, write):
    (tmp_path / "tokenizer.json").write_text(words.to_str(), encoding="utf-8")
    write(tmp_path, **{name: content})
    with pytest.raises(ValueError, match=message) as refused:
        PretrainedTokenizer.load(tmp_path)
    assert f"{name}.json" in str(refused.value)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("vocab.json", "RobertaTokenizer"),
        ("vocab.txt", "MPNetTokenizerFast"),
        ("spiece.model", "XLNetTokenizer"),
        ("tokenizer.model", 3),
    ],
)
def test_refuses_models_with_rules_of_their_own(tmp_path, file, name, write):
    (tmp_path / file).touch()
    write(tmp_path, tokenizer_config={"tokenizer_class": name})
    with pytest.raises(ValueError, match=f"is read for the tokenizers of .* got {name!r}"):
        PretrainedTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "added", [3, {"x": {}}, {"0": {"content": "new"}}, {"9": {"content": 3}}, {"9": 3}]
)
def test_refuses_added_tokens(tmp_path, added, write):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n")
    write(tmp_path, tokenizer_config={"added_tokens_decoder": added})
    with pytest.raises(ValueError, match="added_tokens_decoder is not as expected"):
        PretrainedTokenizer.load(tmp_path)


def test_refuses_folders(tmp_path):
    with pytest.raises(ValueError, match="must be a folder or a file"):
        PretrainedTokenizer.load(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"must hold tokenizer\.json"):
        PretrainedTokenizer.load(tmp_path)
    for name in ("tok1.bin", "tok2.bin"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"one tokenizer, got tok1\.bin and tok2\.bin"):
        PretrainedTokenizer.load(tmp_path)
    (tmp_path / "tokens.pkl").touch()
    with pytest.raises(ValueError, match=r"must be a \.json"):
        PretrainedTokenizer.load(tmp_path / "tokens.pkl")


def test_refuses_huge_files(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(ValueError, match="must have at most"):
        PretrainedTokenizer.load(tmp_path)
