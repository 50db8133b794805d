"""One small file per family: its config and its names in the shared terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmos_fast.models.families import bert, gpt2, llama, t5
from llmos_fast.models.family import Family

# by "model_type" of a Hugging Face config, which may decide more
_FAMILIES: dict[str, Callable[[dict[str, Any]], Family]] = {
    "gpt2": lambda _: gpt2.FAMILY,
    "llama": lambda _: llama.FAMILY,
    "mistral": lambda _: llama.FAMILY,
    "qwen2": lambda _: llama.FAMILY,
    "qwen3": lambda _: llama.FAMILY,
    "bert": lambda _: bert.FAMILY,
    "t5": t5.family,
}


def family_of(config: dict[str, Any]) -> Family:
    """The family of a Hugging Face config. Raises ValueError where it is none of ours."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"load: model_type must be one of {known}, got {kind!r}")
    return _FAMILIES[kind](config)


__all__ = ["Family", "family_of"]
