"""The files in which tokenizers of models come, and the settings beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llmos_fast.data.pretrained.pieces import Pieces, read_llama2c, read_sentencepiece
from llmos_fast.data.pretrained.settings import (
    OWN,
    ROLES,
    chat_template,
    flag,
    read_bytes,
    read_object,
    read_settings,
    read_text,
    repeated,
    special_ids,
)

# of each format the classes of transformers that read it as it is read here
_CLASSES = {
    ".model": ("Llama", "Gemma", "T5"),
    ".txt": ("Bert", "DistilBert", "Electra"),
    "vocab.json": ("GPT2",),
}


def find(path: Path) -> Path:
    """The file of a folder that holds its tokenizer; a file is its own.

    Raises ValueError where there is none, or several llama2.c or sentencepiece files.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"PretrainedTokenizer.load: {path} must be a folder or a file, got neither"
        )
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model"):
        if (path / name).is_file():
            return path / name
    for pattern in ("tok*.model", "tok*.bin"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise ValueError(
                f"PretrainedTokenizer.load: {path} must hold one tokenizer, got {names}"
            )
        if found:
            return found[0]
    raise ValueError(
        f"PretrainedTokenizer.load: {path} must hold tokenizer.json, vocab.json and merges.txt, "
        "vocab.txt, spiece.model, tok*.model or tok*.bin, got none"
    )


def read(path: Path) -> dict[str, Any]:
    """Arguments of ``PretrainedTokenizer`` from ``path`` and the settings beside it.

    Raises ValueError that names the file and the rule it breaks.
    """
    folder = path.parent
    settings = read_settings(folder)
    own = settings[OWN]
    complete = path.suffix == ".json" and path.name != "vocab.json"
    if not complete:
        _check_class(path, own)
    defaults: dict[str, str | int | None] = {}
    match path.suffix:
        case ".model" | ".bin":
            reader = read_sentencepiece if path.suffix == ".model" else read_llama2c
            pieces = _guarded(path, lambda: reader(path, read_bytes(path)))
            tokenizer = _surrounded(pieces, path, own)
            own_ids = (pieces.begin_id, pieces.end_id, pieces.pad_id, pieces.unknown_id)
            defaults = dict(zip(ROLES, own_ids, strict=True))
        case ".txt":
            tokenizer = _word_piece(path, own)
            defaults = {"pad": "[PAD]", "unknown": "[UNK]"}
        case ".json" if path.name == "vocab.json":
            tokenizer = _byte_level(path, own)
            defaults = {"begin": "<|endoftext|>", "end": "<|endoftext|>"}
        case ".json":
            read_object(path)  # the package accepts repeated names
            tokenizer = _guarded(path, lambda: _complete(read_text(path)))
        case _:
            raise ValueError(f"{path} must be a .json, .txt, .model or .bin file")
    if not complete:
        _add_tokens(tokenizer, folder, own)
    ids = special_ids(tokenizer, folder, settings, defaults)
    return {
        "tokenizer": tokenizer,
        **ids,
        "adds_begin": flag(own, "add_bos_token", False, folder) and ids["begin_id"] is not None,
        "chat_template": chat_template(folder, own),
    }


def _check_class(path: Path, own: Mapping[str, Any]) -> None:
    """Other models have such files too, with rules of their own in the code of transformers."""
    known = _CLASSES.get(path.name) or _CLASSES.get(path.suffix)
    name = own.get("tokenizer_class")
    if known and name is not None:
        short = str(name).removesuffix("Fast").removesuffix("Tokenizer")
        if short not in (*known, "PreTrained"):
            raise ValueError(
                f"{path.parent / OWN}: {path.name} is read for the tokenizers of "
                f"{', '.join(known)}, got {name!r}: convert it to a tokenizer.json"
            )


def _complete(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    # what the package finds wrong with a post-processor or a model only when they are used
    tokenizer.encode("\u20ac a")
    tokenizer.encode("a", "b")
    return tokenizer


def _surrounded(pieces: Pieces, path: Path, own: Mapping[str, Any]) -> Tokenizer:
    """The tokens around a text: Llama's BPE begins it, T5's Unigram ends it."""
    tokenizer = pieces.tokenizer
    begins = flag(own, "add_bos_token", not pieces.unigram, path.parent)
    ends = flag(own, "add_eos_token", pieces.unigram, path.parent)
    first = [pieces.begin_id] if begins and pieces.begin_id is not None else []
    last = [pieces.end_id] if ends and pieces.end_id is not None else []
    named = [(tokenizer.id_to_token(i), i) for i in (*first, *last)]
    before, after = [name for name, _ in named[: len(first)]], [n for n, _ in named[len(first) :]]
    if named:
        tokenizer.post_processor = _guarded(
            path,
            lambda: processors.TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *before, "$B", *after],
                special_tokens=named,
            ),
        )
    extra = own.get("extra_ids", 0)
    if not isinstance(extra, int) or not 0 <= extra <= 100_000:
        raise ValueError(f"{path.parent / OWN}: extra_ids must be 0..100000, got {extra!r}")
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(extra))])
    return tokenizer


def _word_piece(path: Path, own: Mapping[str, Any]) -> Tokenizer:
    """BERT: lower case unless tokenizer_config.json says otherwise."""
    tokens = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{path}: tokens must be distinct, got {repeated(tokens)!r} twice")
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if token not in vocabulary:
            raise ValueError(f"{path}: must hold {token}, got none")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    lower = flag(own, "do_lower_case", True, path.parent)
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=flag(own, "tokenize_chinese_chars", True, path.parent),
        strip_accents=flag(own, "strip_accents", lower, path.parent),
        lowercase=lower,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    special = [f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    tokenizer.add_special_tokens([token for token in special if token in vocabulary])
    return tokenizer


def _byte_level(path: Path, own: Mapping[str, Any]) -> Tokenizer:
    """GPT-2: vocab.json, and merges.txt beside it."""
    vocabulary = read_object(path)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in vocabulary.values()):
        raise ValueError(f"{path}: ids must be whole numbers")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"{path}: ids must be 0..{len(vocabulary) - 1}, each once")
    merges_path = path.with_name("merges.txt")
    merges = []
    for number, line in enumerate(read_text(merges_path).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not right or not all(part in vocabulary for part in (left, right, left + right)):
            raise ValueError(
                f"{merges_path}: line {number} must be two tokens that make a third, got {line!r}"
            )
        merges.append((left, right))
    tokenizer: Tokenizer = _guarded(path, lambda: Tokenizer(models.BPE(vocabulary, merges)))
    spaced = flag(own, "add_prefix_space", False, path.parent)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if "<|endoftext|>" in vocabulary:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, folder: Path, own: Mapping[str, Any]) -> None:
    """What tokenizer_config.json adds to a vocabulary that knows nothing of it."""
    where = folder / OWN
    added = own.get("added_tokens_decoder", {})
    try:
        for index, token in sorted((int(i), dict(token)) for i, token in added.items()):
            name = token.pop("content")
            flags = {key: bool(token[key]) for key in ("special", "normalized") if key in token}
            tokenizer.add_tokens([AddedToken(name, **flags)])
            if tokenizer.token_to_id(name) != index:
                raise ValueError(f"id {index} of {name!r} is not free")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: added_tokens_decoder is not as expected: {error}") from error


def _guarded(path: Path, build: Callable[[], Any]) -> Any:
    """What ``build`` makes; the package raises bare Exception, and panics at hostile content."""
    try:
        return build()
    except ValueError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        raise
