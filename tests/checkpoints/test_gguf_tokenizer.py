"""Tokenizers in GGUF files, against those that were written, and files damaged at random."""

import io
import json
import lzma
import random
from importlib import resources

import numpy as np
import pytest

from llmos_fast.checkpoints.source import open_source

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces\nand a\r\n\n line 12345 don't DON'T",
    "Ärger, naïve, 日本語 and 🙂!",
    "",
    " ",
]


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level tokenizer, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def add_byte_level(writer, tokenizer, words="gpt-2"):
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(5)
    writer.add_chat_template("{{ messages }}")


def test_byte_level_tokenizers_are_those_that_were_trained(byte_level, bare_llama):
    path = bare_llama(add=lambda w: add_byte_level(w, byte_level))
    source = open_source(path)
    assert source.config["eos_token_id"] == 0
    tokenizer, ids = source.tokenizer()
    for text in TEXTS:
        expected = byte_level.encode(text).ids
        assert tokenizer.encode(text).ids == expected
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("a<|end|>").ids[-1] == 0
    assert ids == {
        "begin_id": None,
        "end_ids": [0, 5],
        "unknown_id": None,
        "pad_id": None,
        "adds_begin": False,
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ("gpt-2", ["Ġ", "Ġ12345", "'t", "x"]),
        ("llama-bpe", ["Ġ", "Ġ", "123", "45", "'t", "x"]),
        ("qwen2", ["Ġ", "Ġ", "1", "2", "3", "4", "5", "'t", "x"]),
        ("smollm", ["ĠĠ", "1", "2", "3", "4", "5", "'t", "x"]),
    ],
)
def test_words_end_where_the_file_says(words, pieces, byte_level, bare_llama):
    path = bare_llama(add=lambda w: add_byte_level(w, byte_level, words))
    tokenizer, ids = open_source(path).tokenizer()
    got = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("  12345'tx")]
    assert got == pieces
    assert ids["adds_begin"] == (words == "llama-bpe")


def test_unknown_words_are_refused(byte_level, bare_llama):
    path = bare_llama(add=lambda w: add_byte_level(w, byte_level, "tekken"))
    with pytest.raises(ValueError, match=r"split words as .* got 'tekken'"):
        open_source(path).tokenizer()


def add_pieces(writer, pieces):
    """pieces: text, score and type (1 normal, 2 unknown, 3 control, 6 byte) of every token."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def pieces_of(model):
    kinds = {model.is_unknown: 2, model.is_control: 3, model.is_byte: 6}
    return [
        (model.id_to_piece(i), model.get_score(i), next((k for f, k in kinds.items() if f(i)), 1))
        for i in range(model.vocab_size())
    ]


@pytest.fixture(scope="module")
def sentencepiece():
    return pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")


def test_pieces_are_those_of_sentencepiece_trained_as_llamas(sentencepiece, bare_llama):
    articles = resources.files("llmos_fast.data") / "wikitext2" / "test.txt.xz"
    lines = lzma.decompress(articles.read_bytes()).decode().splitlines()
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines[:2000] if line.strip()),
        model_writer=trained,
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    path = bare_llama(add=lambda w: add_pieces(w, pieces_of(model)))
    tokenizer, _ = open_source(path).tokenizer()
    letters = random.Random(0)
    nonsense = ["".join(letters.choices("theanrs ", k=60)) for _ in range(200)]
    # here as in transformers, though not in sentencepiece, a text may name the unknown token
    plain = [line for line in lines[2000:2500] if "<unk>" not in line]
    for text in [*TEXTS, *plain, *nonsense]:
        expected = model.encode(text)
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == model.decode(expected)


def test_pieces_of_babyllama_are_those_of_sentencepiece(sentencepiece, shared, bare_llama):
    model = sentencepiece.SentencePieceProcessor(str(shared("babyllama_tok105/tok105.model")))
    path = bare_llama(add=lambda w: add_pieces(w, pieces_of(model)))
    tokenizer, ids = open_source(path).tokenizer()
    # this model, unlike Llama's, makes one space of several
    texts = [" ".join(text.split()) for text in TEXTS if text.strip()]
    for text in [*texts, "the the little dog said that they then went there and"]:
        assert tokenizer.encode(text).ids == model.encode(text), text
    assert tokenizer.decode(model.encode("a dog.")) == "a dog."
    names = ("begin_id", "end_ids", "unknown_id", "pad_id", "adds_begin")
    assert [ids[name] for name in names] == [1, [2], 0, None, True]


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
PIECES += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
PIECES += [("▁a", -1.0, 1), ("▁ab", -2.0, 1), ("▁", -3.0, 1), ("a", -4.0, 1), ("b", -5.0, 1)]


def test_letters_without_a_token_are_bytes(bare_llama):
    path = bare_llama(add=lambda w: add_pieces(w, PIECES))
    tokenizer, _ = open_source(path).tokenizer()
    assert tokenizer.encode("ab ba é").tokens == ["▁ab", "▁", "b", "a", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab ba é").ids) == "ab ba é"


NUMBERS = {"tokens": [1, 2], "scores": [1, 2], "pre": [1, 2], "add_bos_token": [1, 2]}
WRONG = {
    **{key: {key: value} for key, value in NUMBERS.items()},
    "a token twice": {"tokens": ["a", "b", "a", *map(str, range(len(PIECES) - 3))]},
    "fewer scores": {"scores": [1.0, 2.0]},
    "fewer types": {"token_type": [1, 1]},
    "no such token": {"bos_token_id": len(PIECES)},
    "a long token": {"tokens": [*map(str, range(len(PIECES) - 1)), "a" * 100_000]},
}


@pytest.mark.parametrize("name", WRONG)
def test_vocabularies_that_contradict_themselves_are_refused(name, bare_llama):
    def add(writer):
        add_pieces(writer, PIECES)
        for key, value in WRONG[name].items():
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
            key = f"tokenizer.ggml.{key}"
            writer.add_array(key, value) if isinstance(value, list) else writer.add_uint32(
                key, value
            )

    source = open_source(bare_llama(add=add))
    with pytest.raises(ValueError, match="must have"):
        source.tokenizer()


def test_merges_are_of_tokens(byte_level, bare_llama):
    def add(writer):
        add_byte_level(writer, byte_level)
        writer.kv_data[0].pop("tokenizer.ggml.merges")
        writer.add_token_merges(["no token"])

    with pytest.raises(ValueError, match="merges of tokens to tokens, got 'no token'"):
        open_source(bare_llama(add=add)).tokenizer()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_files_damaged_at_random_are_read_or_refused(kind, byte_level, fuzz, bare_llama):
    pieces = [*PIECES[:3], *PIECES[-5:]]
    add = {
        "gpt2": lambda w: add_byte_level(w, byte_level),
        "llama": lambda w: add_pieces(w, pieces),
    }
    ones = np.ones((512, 512), np.float32)[:, :32]
    query = gguf.quants.quantize(ones, gguf.GGMLQuantizationType.Q8_0)
    path = bare_llama({"blk.0.attn_q.weight": (query, gguf.GGMLQuantizationType.Q8_0)}, add[kind])
    results = fuzz(path)
    assert min(results.values()) > 20
