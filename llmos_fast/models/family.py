"""What a family says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llmos_fast.models.config import LARGEST_NUMBER, LARGEST_SIZE, ModelConfig

# activations as Hugging Face names them
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Family:
    """How a family's checkpoints become a model.

    config:   of Hugging Face's config.json
    build:    the model, from both
    names:    for each of our parameters, with "{}" for a layer's number, those of Hugging Face
              whose rows it has, one after another
    prefix:   that a checkpoint may have put before all its names
    bare:     beginnings of names that never have the prefix
    ignored:  regular expressions of tensors that mean nothing to us
    older:    endings of names, and what older checkpoints have in their place
    transposed: endings of our names whose weights are stored [in out] (GPT-2's Conv1D)
    """

    config: Callable[[dict[str, Any]], ModelConfig]
    build: Callable[[ModelConfig, dict[str, Any]], nn.Module]
    names: Mapping[str, tuple[str, ...]]
    prefix: str = ""
    bare: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()

    def sources(self, name: str) -> tuple[str, ...]:
        """Names in a checkpoint, without prefix, of our parameter ``name``.

        Raises ValueError for a parameter that the family has no name for.
        """
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        if layer is None:
            general, number = name, ""
        else:
            number = layer.group()
            general = f"{name[: layer.start()]}{{}}{name[layer.end() :]}"
        if general not in self.names:
            raise ValueError(f"Family: names must hold {general}, got none")
        return tuple(source.format(number) for source in self.names[general])

    def prefixed(self, source: str) -> str:
        """A name in a checkpoint with its prefix."""
        return source if source.startswith(self.bare) else self.prefix + source

    def spellings(self, source: str) -> Iterator[str]:
        """Every name that a checkpoint may have for ``source``."""
        for name in (self.prefixed(source), source):
            yield name
            for ending, old in self.older.items():
                if name.endswith(ending):
                    yield name.removesuffix(ending) + old

    def is_transposed(self, name: str) -> bool:
        """Whether a checkpoint has our parameter ``name`` the other way round."""
        return name.endswith(self.transposed)

    def is_head(self, name: str) -> bool:
        """Whether a tensor, without prefix, is the output projection, which may be tied."""
        return name in self.names.get("head.weight", ())

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of a checkpoint, without prefix, need not be read."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def both(ours: str, theirs: str | tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The weight and the bias of a module: ``names`` of ours from those of theirs."""
    sources = (theirs,) if isinstance(theirs, str) else theirs
    return {
        f"{ours}.{part}": tuple(f"{source}.{part}" for source in sources)
        for part in ("weight", "bias")
    }


class Reader:
    """Values of a Hugging Face config, checked as they are read."""

    def __init__(self, config: dict[str, Any]):
        self._config = config

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer that is not absurd."""
        value = self._config.get(name)
        value = default if value is None else value
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not least <= value <= LARGEST_SIZE
        ):
            rule = f"an integer in {least}..{LARGEST_SIZE}"
            raise ValueError(f"load: {name} of config.json must be {rule}, got {_short(value)}")
        return value

    def heads(self, width: str, heads: str, default: tuple[int, int]) -> tuple[int, int, int]:
        """(width, heads, features of a head), of heads that divide the width."""
        features, count = self.integer(width, default[0]), self.integer(heads, default[1])
        if features % count:
            raise ValueError(
                f"load: {width} of config.json must be a multiple of {heads}, "
                f"got {features} and {count}"
            )
        return features, count, features // count

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self._config.get(name)
        value = default if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not abs(value) < LARGEST_NUMBER
        ):
            raise ValueError(f"load: {name} of config.json must be a number, got {_short(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            rule = "true or false"
            raise ValueError(f"load: {name} of config.json must be {rule}, got {_short(value)}")
        return value

    def activation(self, name: str, default: str) -> str:
        """Our name of an activation."""
        value = self._config.get(name) or default
        if not isinstance(value, str) or value not in ACTIVATIONS:
            rule = f"one of {', '.join(ACTIVATIONS)}"
            raise ValueError(f"load: {name} of config.json must be {rule}, got {_short(value)}")
        return ACTIVATIONS[value]

    def unsupported(self, **expected: Any) -> None:
        """Raise ValueError where an option has a value that would change what is computed."""
        for name, value in expected.items():
            given = self._config.get(name, value)
            if given is not None and given != value:
                raise ValueError(f"load: {name} of config.json must be {value}, got {given!r}")


def _short(value: object) -> str:
    """A value of a config as messages quote it; the longest integers have no decimal form."""
    return "a huge integer" if isinstance(value, int) and abs(value) > 2**64 else repr(value)[:200]
