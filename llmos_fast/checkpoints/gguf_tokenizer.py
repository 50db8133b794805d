"""The tokenizer in a GGUF file, as Hugging Face's tokenizers builds it.

"gpt2"     byte-level pairs: tokens and merges; tokenizer.ggml.pre says where words end
"llama"    sentencepiece's pairs: tokens and scores; bytes for what has no token; "▁" for spaces
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from llmos_fast.checkpoints.gguf_file import GGUF

KINDS = ("gpt2", "llama")

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # of tokenizer.ggml.token_type

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3")
_DIGITS = {**dict.fromkeys(_LLAMA3, "{1,3}"), "qwen2": ""}
_BYTE_LEVEL = ("default", "gpt-2", *_DIGITS, "smollm")
# each token is split at every letter; sentencepiece makes none beyond 16 of its own
_LONGEST = 256


class _Vocabulary:
    """The arrays of a file, checked."""

    def __init__(self, file: GGUF):
        self.file = file
        self.tokens = self.array("tokens", str)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if not self.tokens or len(self.ids) < len(self.tokens):
            got = f"{len(self.tokens)}, {len(self.ids)} of them different"
            raise file.error("have tokens, each once", got)
        self.types = self.array("token_type", int, len(self.tokens), 1)

    def get(self, key: str) -> Any:
        return self.file.values.get(f"tokenizer.ggml.{key}")

    def array(self, key: str, kind: type, length: int | None = None, default: Any = None) -> Any:
        """A list; ``default`` at every place where the file has none."""
        value = self.get(key)
        if value is None and default is not None:
            return [default] * (length or 0)
        value = value.tolist() if hasattr(value, "tolist") else value
        right = isinstance(value, list) and all(type(item) is kind for item in value)
        if not right or length not in (None, len(value)):
            rule = f"have {length or 'some'} {key} of {kind.__name__}"
            raise self.file.error(rule, type(value).__name__)
        return value

    def one(self, key: str, default: Any) -> Any:
        """A value of the type of ``default``, which stands for one that the file has not got."""
        value = default if self.get(key) is None else self.get(key)
        if type(value) is not type(default):
            raise self.file.error(f"have one {type(default).__name__} {key}", type(value).__name__)
        return value

    def token_id(self, key: str) -> int | None:
        value = self.get(f"{key}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < len(self.tokens)):
            raise self.file.error(f"have a token as {key}_token_id", repr(value))
        return value


def build_tokenizer(file: GGUF) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, which adds no tokens of its own, and what one needs to use it.

    The dict holds begin_id, end_ids (of a text and of a turn), unknown_id, pad_id, adds_begin
    (whether a text starts with begin_id) and chat_template. Raises ValueError for a tokenizer that
    is damaged, or whose words end where this project does not know.
    """
    vocabulary = _Vocabulary(file)
    pieces, words = vocabulary.one("model", "") == "llama", vocabulary.one("pre", "default")
    tokenizer = _sentencepiece(vocabulary) if pieces else _byte_level(vocabulary, words)
    for special, kinds in {True: (_UNKNOWN, _CONTROL), False: (_USER,)}.items():
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind in kinds and token
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    ends = dict.fromkeys(vocabulary.token_id(name) for name in ("eos", "eot", "eom"))
    template = file.values.get("tokenizer.chat_template")
    return tokenizer, {
        "begin_id": vocabulary.token_id("bos"),
        "end_ids": [end for end in ends if end is not None],
        "unknown_id": vocabulary.token_id("unknown"),
        "pad_id": vocabulary.token_id("padding"),
        "adds_begin": vocabulary.one("add_bos_token", pieces or words in _LLAMA3),
        "chat_template": template if isinstance(template, str) else None,
    }


def _byte_level(vocabulary: _Vocabulary, words: str) -> Tokenizer:
    ids = vocabulary.ids
    if words not in _BYTE_LEVEL:
        raise vocabulary.file.error(f"split words as {', '.join(_BYTE_LEVEL)}", repr(words))
    merges = []
    for merge in vocabulary.array("merges", str):
        left, _, right = merge.partition(" ")
        if not (left in ids and right in ids and left + right in ids):
            raise vocabulary.file.error("have merges of tokens to tokens", repr(merge[:80]))
        merges.append((left, right))
    # Llama 3 takes a word that is a token without merging it
    whole = words in _LLAMA3
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=whole))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words not in _DIGITS)
    before: list[Any] = []
    if words in _DIGITS:
        before = [pre_tokenizers.Split(Regex(_WORDS % _DIGITS[words]), "isolated")]
    elif words == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    tokens = vocabulary.tokens
    if (longest := max(map(len, tokens))) > _LONGEST:
        raise vocabulary.file.error(f"have tokens of at most {_LONGEST} letters", longest)
    scores = vocabulary.array("scores", float, len(tokens))
    unknown = vocabulary.token_id("unknown")
    model = models.BPE(
        vocab=vocabulary.ids,
        merges=_merges(vocabulary.ids, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    begin = vocabulary.one("add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if begin else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if begin else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that is a token, the best score first."""
    pairs = chain.from_iterable(
        ((token[:i], token[i:]) for i in range(1, len(token))) for token in ids
    )
    known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
    return sorted(known, key=lambda pair: -scores[ids[pair[0] + pair[1]]])
