"""Published tokenizers against their own vectors, sentencepiece, transformers and slow readings.

What needs the project's shared data, which is not part of the repository, is skipped without it.
"""

import json
import random
import struct
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from llmos_fast.data import PretrainedTokenizer, encode_lines
from llmos_fast.data.pretrained.text_stream import _byte_alphabet

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"not run: the shared data is not at {SHARED}"
)
ODD = [
    "",
    " ",
    "   a  b ",
    "\t\n x\n",
    "日本語 テキスト",
    "ﬁ ½ ① ﷺ",
    "e\u0301 \u200b",
    "😀😀 👩‍👩‍👧",
    "नमस्ते दुनिया",
    "мир во всём мире",
    "كل الناس يولدون أحرارا",
    "มนุษย์ทั้งหลาย",
    "\ufffd",
    "a \u00a0 b",
    "\x00a",
    "<0x41>",
    "aaaaaaa        bbbb",
    " . , ! n't 's",
]
FILES = {
    "bert": "tokenizers/bert-base-uncased",
    "chinese": "tokenizers/bert-base-chinese",
    "gpt2": "tokenizers/gpt2",
    "t5-json": "tokenizers/t5",
    "t5-sentencepiece": "tokenizers/t5/spiece.model",
    "babyllama": "models/babyllama_tok105",
    "stories": "models/stories260k",
}
_loaded = {}


def shared(name):
    if name not in _loaded:
        _loaded[name] = PretrainedTokenizer.load(SHARED / FILES[name])
    return _loaded[name]


def stories(count):
    text = (SHARED / "tinystories/train_sample.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>")[:count]]


def paragraphs():
    """Real text of four languages."""
    lines = []
    for language in ("en", "es", "de", "zh"):
        path = SHARED / f"xquad/xquad.{language}.json"
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        lines += [articles[i]["paragraphs"][0]["context"][:400] for i in range(4)]
    return lines


def streamed(tokenizer, ids, special=False):
    stream = tokenizer.stream(special=special)
    return "".join([*map(stream.push, ids), stream.flush()])


# --- what each format encodes


@needs_shared
@pytest.mark.parametrize(
    ("name", "file"), [("bert", "bert-base-uncased"), ("gpt2", "gpt2")], ids=["bert", "gpt2"]
)
def test_vectors(name, file):
    vectors = json.loads((SHARED / f"tokenizers/vectors/{file}.json").read_text(encoding="utf-8"))
    assert len(vectors) > 30
    for vector in vectors:
        assert shared(name).encode(vector["text"], special=False) == vector["ids"]


@needs_shared
def test_bert_surrounds_texts():
    bert = shared("bert")
    assert bert.encode("hi") == [101, 7632, 102]
    assert bert.encode_pair("hi", "hi") == ([101, 7632, 102, 7632, 102], [0, 0, 0, 1, 1])
    assert bert.encode_pair("hi", "hi", special=False) == ([7632, 7632], [0, 1])
    assert (bert.begin_id, bert.end_ids, bert.pad_id, bert.unknown_id) == (None, (), 0, 100)
    assert bert.decode(bert.encode("Hello, wörlds!")) == "hello, worlds!"
    assert bert.decode([101, 7632, 102], special=True) == "[CLS] hi [SEP]"


@needs_shared
def test_chinese():
    chinese = shared("chinese")
    ids = chinese.encode("我想在apple工作", special=False)
    assert chinese.decode(ids) == "我 想 在 apple 工 作"
    assert chinese.unknown_id not in ids


@needs_shared
def test_gpt2_round_trips():
    gpt2 = shared("gpt2")
    assert gpt2.begin_id == gpt2.end_id == 50256
    for text in [*ODD, *paragraphs()]:
        assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode("a<|endoftext|>")[-1] == 50256
    assert gpt2.encode_line("a") == [64, 198]
    assert encode_lines(gpt2, ["a", "a"]).tolist() == [64, 198] * 2


@needs_shared
@pytest.mark.parametrize("name", ["t5-json", "t5-sentencepiece", "babyllama"])
def test_equals_sentencepiece(name):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = {"babyllama": "models/babyllama_tok105/tok105.model"}.get(
        name, FILES["t5-sentencepiece"]
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / file))
    ours = shared(name)
    for text in [*ODD, "▁ a", "a▁▁b ▁", *stories(40), *paragraphs()]:
        ids = theirs.encode(text)
        assert ours.encode(text, special=False) == ids
        if theirs.unk_id() not in ids and "▁" not in text:
            assert ours.decode(ids) == theirs.decode(ids)


@needs_shared
def test_what_t5_and_llama_add():
    t5, t5_json, llama = shared("t5-sentencepiece"), shared("t5-json"), shared("babyllama")
    assert (t5.begin_id, t5.end_ids, t5.pad_id, t5.unknown_id) == (None, (1,), 0, 2)
    assert t5.encode("hi") == t5_json.encode("hi") == [*t5.encode("hi", special=False), 1]
    assert (llama.begin_id, llama.end_ids, llama.pad_id, llama.unknown_id) == (1, (2,), None, 0)
    assert llama.encode("hi") == [1, *llama.encode("hi", special=False)]


class SlowLlama2c:
    """run.c word for word: the best pair of the whole text again and again."""

    def __init__(self, raw):
        self.scores, offset = {}, 4
        while offset < len(raw):
            score, length = struct.unpack_from("<fi", raw, offset)
            offset += 8 + length
            self.scores[raw[offset - length : offset]] = (score, len(self.scores))
        self.names = list(self.scores)

    def encode(self, text):
        pieces = [b" "] if text else []
        for letter in text:
            raw = letter.encode()
            known = raw in self.scores
            pieces += [raw] if known else [self.names[byte + 3] for byte in raw]
        while True:
            best, where = None, None
            for i, (a, b) in enumerate(pairwise(pieces)):
                score = self.scores.get(a + b, (None,))[0]
                if score is not None and (best is None or score > best):
                    best, where = score, i
            if where is None:
                return [1, *(self.scores[piece][1] for piece in pieces)]
            pieces[where : where + 2] = [pieces[where] + pieces[where + 1]]


@needs_shared
def test_llama2c_is_the_slow_algorithm():
    path = SHARED / "models/stories260k/tok512.bin"
    slow, tokenizer = SlowLlama2c(path.read_bytes()), shared("stories")
    letters = [n.decode() for n in slow.names[259:]] + ["é", "日", "😀", "\t"]
    rng = random.Random(0)
    noise = ["".join(rng.choices(letters, k=60)) for _ in range(200)]
    for text in [*ODD, *noise, *(story[:300] for story in stories(60))]:
        ids = tokenizer.encode(text)
        assert ids == slow.encode(text)
        assert tokenizer.decode(ids) == text


@needs_shared
def test_llama2c_round_trips_stories():
    tokenizer = shared("stories")
    assert (tokenizer.begin_id, tokenizer.end_id, len(tokenizer)) == (1, 2, 512)
    for story in stories(1000):
        assert tokenizer.decode(tokenizer.encode(story)) == story


# --- sentencepiece's settings, on small models made here


def train(tmp_path, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = (SHARED / "tokenizers/bpe_fixture_cs336/corpus.en").read_text(encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines.split("\n")[:400]),
        model_prefix=str(tmp_path / "tok"),
        vocab_size=600,
        minloglevel=2,
        **options,
    )
    path = tmp_path / "tok.model"
    return PretrainedTokenizer.load(path), sentencepiece.SentencePieceProcessor(str(path))


LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}


@needs_shared
@pytest.mark.parametrize(
    "options",
    [
        LLAMA,
        LLAMA | {"add_dummy_prefix": False, "user_defined_symbols": ["<mask>", "ing", "  "]},
        LLAMA | {"user_defined_symbols": ["<mask>", "th"], "remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf"},
    ],
    ids=["llama", "gemma", "own-symbols", "unigram", "unigram-bytes"],
)
def test_trained_models_equal_sentencepiece(tmp_path, options):
    ours, theirs = train(tmp_path, **options)
    rng = random.Random(0)
    noise = ["".join(rng.choices("  theainr<mak>", k=40)) + "<mask>" for _ in range(300)]
    # a text that is the name of a byte is that byte in tokenizers, but for plain BPE
    odd = [text for text in ODD if text != "<0x41>" or options == LLAMA]
    for text in [*odd, "a <mask>thing", *noise, *stories(20), *paragraphs()]:
        ids = theirs.encode(text)
        assert ours.encode(text, special=False) == ids
        if theirs.unk_id() not in ids and not options.get("remove_extra_whitespaces", True):
            assert ours.decode(ids) == theirs.decode(ids) == text


# --- streams


def test_byte_alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(_byte_alphabet()) == sorted(ByteLevel.alphabet())
    assert sorted(_byte_alphabet().values()) == list(range(256))


@needs_shared
@pytest.mark.parametrize("name", FILES)
def test_streams_equal_decode(name):
    tokenizer, rng = shared(name), random.Random(0)
    texts = [tokenizer.encode(text) for text in [*ODD, *paragraphs()]]
    noise = [rng.choices(range(len(tokenizer)), k=30) for _ in range(200)]
    for special in (False, True):
        for ids in [*texts, *noise]:
            whole = tokenizer.decode(ids, special=special)
            assert streamed(tokenizer, ids, special) == whole
            theirs = tokenizer._tokenizer.decode(ids, skip_special_tokens=not special)
            # theirs writes U+FFFD for every byte of a run that holds a fault
            if "\ufffd" not in theirs:
                assert whole == theirs


@needs_shared
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_round_trips(text):
    for name in ("gpt2", "stories"):
        tokenizer = shared(name)
        # special tokens in a text are those tokens
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) == text


@needs_shared
def test_text_comes_as_soon_as_it_is_final():
    gpt2 = shared("gpt2")
    stream = gpt2.stream()
    pushed = [stream.push(i) for i in gpt2.encode("a🦙b")]
    assert pushed == ["a", "", "", "🦙", "b"]
    assert (stream.push(gpt2.encode("🦙")[0]), stream.flush()) == ("", "\ufffd")
    assert stream.push(gpt2.encode("a")[0]) == "a"


@needs_shared
def test_only_a_first_space_is_left_out():
    tokenizer = shared("stories")
    begin, *word = tokenizer.encode("a")
    assert len(word) == 1
    stream = tokenizer.stream()
    assert [stream.push(i) for i in (begin, *word, *word)] == ["", "a", " a"]
    assert tokenizer.decode(tokenizer.encode("  a")) == "  a"


def test_tokens_without_a_decoder_stand_apart():
    words = PretrainedTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?")))
    assert words.decode([0, 1]) == streamed(words, [0, 1]) == "a b"


# --- settings


def test_special_ids_of_settings(words, tmp_path, write):
    (tmp_path / "tokenizer.json").write_text(words.to_str(), encoding="utf-8")
    write(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "</s>"}, "add_bos_token": True},
        special_tokens_map={"bos_token": "<s>"},
        generation_config={"eos_token_id": [3, 2], "pad_token_id": 4},
        config={"eos_token_id": 5, "pad_token_id": 5},
    )
    loaded = PretrainedTokenizer.load(tmp_path)
    assert (loaded.begin_id, loaded.end_ids, loaded.pad_id) == (1, (2, 3), 4)
    assert (loaded.unknown_id, loaded.end_id, len(loaded)) == (0, 2, 7)
    assert loaded.encode("hi") == [1, 5]
    assert loaded.encode("hi", special=False) == [5]
    with pytest.raises(ValueError, match="encode: 'huh' has a part"):
        loaded.encode("huh", "raise")


def test_config_speaks_where_nothing_else_does(words, tmp_path, write):
    (tmp_path / "tokenizer.json").write_text(words.to_str(), encoding="utf-8")
    write(tmp_path, config={"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": -1})
    loaded = PretrainedTokenizer.load(tmp_path)
    assert (loaded.begin_id, loaded.end_ids, loaded.pad_id) == (1, (3,), None)
    assert loaded.encode("hi") == [5]


def test_truncation_is_taken_away(words):
    words.enable_truncation(1)
    words.enable_padding(length=9)
    assert PretrainedTokenizer(words).encode("hi") == [5]


@needs_shared
def test_tokenizer_config_adds_tokens(tmp_path, write):
    source = SHARED / "tokenizers/t5/spiece.model"
    (tmp_path / "spiece.model").write_bytes(source.read_bytes())
    write(tmp_path, tokenizer_config={"extra_ids": 100, "eos_token": "</s>"})
    t5, theirs = PretrainedTokenizer.load(tmp_path), shared("t5-json")
    assert len(t5) == len(theirs) == 32100
    text = "The <extra_id_0> walks in <extra_id_99> park"
    assert t5.encode(text) == theirs.encode(text)
    added = {str(32000 + i): {"content": f"<{i}>", "special": True} for i in range(3)}
    write(tmp_path, tokenizer_config={"added_tokens_decoder": added})
    t5 = PretrainedTokenizer.load(tmp_path)
    assert t5.encode("<2>", special=False) == [32002]


@needs_shared
def test_bert_keeps_case_where_told(tmp_path, write):
    source = SHARED / "tokenizers/bert-base-uncased/vocab.txt"
    (tmp_path / "vocab.txt").write_bytes(source.read_bytes())
    write(tmp_path, tokenizer_config={"do_lower_case": False})
    cased = PretrainedTokenizer.load(tmp_path)
    assert cased.encode("Hello hello", special=False) == [100, 7592]


# --- saving


@needs_shared
@pytest.mark.parametrize("name", FILES)
def test_save_load(name, tmp_path):
    tokenizer = shared(name)
    tokenizer.save(tmp_path)
    loaded = PretrainedTokenizer.load(tmp_path)
    for key in ("begin_id", "end_ids", "pad_id", "unknown_id", "chat_template"):
        assert getattr(loaded, key) == getattr(tokenizer, key), key
    assert len(loaded) == len(tokenizer)
    for text in ODD:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode(ids, special=True) == tokenizer.decode(ids, special=True)


def test_save_keeps_settings(words, tmp_path):
    tokenizer = PretrainedTokenizer(
        words, begin_id=1, end_ids=(3, 2), pad_id=4, adds_begin=True, chat_template="{{ 1 }}"
    )
    tokenizer.save(tmp_path / "new")
    loaded = PretrainedTokenizer.load(tmp_path / "new")
    assert (loaded.end_ids, loaded.pad_id, loaded.encode("hi")) == ((3, 2), 4, [1, 5])
    assert loaded.chat([]) == "1"


@needs_shared
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-sentencepiece", "stories"])
def test_transformers_opens_it(name, tmp_path, monkeypatch):
    # transformers looks for a package of this name, and would find this project's folder
    monkeypatch.setitem(sys.modules, "kernels", None)
    from transformers import AutoTokenizer

    tokenizer = shared(name)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(tokenizer)
    assert theirs.eos_token_id == tokenizer.end_id
    assert theirs.bos_token_id == tokenizer.begin_id
    assert theirs.pad_token_id == tokenizer.pad_id
    for text in ODD:
        assert theirs.encode(text) == tokenizer.encode(text)
        ids = tokenizer.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


# --- damaged files


@needs_shared
@pytest.mark.parametrize(
    "name", ["tokenizers/t5/spiece.model", "models/babyllama_tok105/tok105.model"]
)
def test_damaged_sentencepiece_never_ends_the_process(tmp_path, name):
    raw, rng = (SHARED / name).read_bytes(), random.Random(0)
    path = tmp_path / "tok.model"
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"tok\.model"):
        PretrainedTokenizer.load(path)
    for _ in range(3 if len(raw) > 10_000 else 200):
        damaged = bytearray(raw)
        for _ in range(3):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(damaged)
        with suppress(ValueError):
            PretrainedTokenizer.load(path).encode("some text")
