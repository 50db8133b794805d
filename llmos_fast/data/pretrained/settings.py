"""What the files beside a tokenizer say of it: special ids and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROLES = ("begin", "end", "pad", "unknown")
OWN = "tokenizer_config.json"
_SHORT = dict(zip(ROLES, ("bos", "eos", "pad", "unk"), strict=True))
_NAMING = (OWN, "special_tokens_map.json")
_NUMBERING = (OWN, "generation_config.json", "config.json")
_LARGEST = 256 << 20

Settings = Mapping[str, Mapping[str, Any]]


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON objects of ``folder`` by file name; of a missing one, an empty one."""
    names = dict.fromkeys((*_NAMING, *_NUMBERING))
    return {n: read_object(folder / n) if (folder / n).is_file() else {} for n in names}


def flag(own: Mapping[str, Any], key: str, default: bool, folder: Path) -> bool:
    """A setting that is true or false; ``default`` where it is absent or null."""
    given = own.get(key)
    if given is not None and not isinstance(given, bool):
        raise ValueError(f"{folder / OWN}: {key} must be true or false, got {given!r}")
    return default if given is None else given


def special_ids(
    tokenizer: Tokenizer, folder: Path, settings: Settings, defaults: Mapping[str, str | int | None]
) -> dict[str, Any]:
    """``begin_id``, ``end_ids``, ``pad_id`` and ``unknown_id``.

    By the tokens' names, else by numbers (every number of a text's end counts), else ``defaults``
    by role, an id or a token.

    Raises ValueError where a file names what the vocabulary lacks.
    """
    found: dict[str, list[int]] = {}
    for role, short in _SHORT.items():
        ids = _named(tokenizer, folder, settings, f"{short}_token")
        if role == "end" or not ids:
            ids += _numbered(tokenizer, folder, settings, f"{short}_token_id", bool(ids))
        if not ids:
            default = defaults.get(role)
            index = tokenizer.token_to_id(default) if isinstance(default, str) else default
            ids = [] if index is None else [index]
        found[role] = ids
    if not found["unknown"]:
        unknown = getattr(tokenizer.model, "unk_token", None)
        index = tokenizer.token_to_id(unknown) if unknown else None
        found["unknown"] = [] if index is None else [index]
    single = {f"{role}_id": next(iter(found[role]), None) for role in ROLES if role != "end"}
    return {**single, "end_ids": tuple(dict.fromkeys(found["end"]))}


def _named(tokenizer: Tokenizer, folder: Path, settings: Settings, key: str) -> list[int]:
    for name in _NAMING:
        token = settings[name].get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        index = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if index is None:
            raise ValueError(f"{folder / name}: {key} must be in the vocabulary, got {token!r}")
        return [index]
    return []


def _numbered(
    tokenizer: Tokenizer, folder: Path, settings: Settings, key: str, named: bool
) -> list[int]:
    """Ids of the first file that has any; config.json speaks where nothing else does."""
    for name in _NUMBERING:
        given = settings[name].get(key)
        ids = given if isinstance(given, list) else [given]
        if given is None or (name == "config.json" and (named or given == -1)):
            continue
        for i in ids:
            valid = isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 32
            if not valid or not tokenizer.id_to_token(int(i)):  # type: ignore[arg-type]
                raise ValueError(f"{folder / name}: {key} must be in the vocabulary, got {i!r}")
        return list(ids)
    return []


def chat_template(folder: Path, own: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json has as the only or "default" one."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return read_text(beside)
    given = own.get("chat_template")
    where = folder / OWN
    if isinstance(given, list):
        try:
            named = {template["name"]: template["template"] for template in given}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: chat_template must name its templates") from error
        given = named.get("default") if len(named) != 1 else next(iter(named.values()))
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{where}: chat_template must be text, got {type(given).__name__}")
    return given


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of at most 256 MiB without repeated names."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            name = repeated([name for name, _ in pairs])
            raise ValueError(f"names must be distinct, got {name!r} more than once")
        return content

    try:
        content = json.loads(read_text(path), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def repeated(names: list[str]) -> str:
    """The first name that came before."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def read_text(path: Path) -> str:
    """A file of UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}") from error


def read_bytes(path: Path) -> bytes:
    """A file of at most 256 MiB."""
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise ValueError(f"{path} must have at most {_LARGEST} bytes, got {size}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
