"""Models that came from a checkpoint, or can become one that Hugging Face transformers opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmos_fast.checkpoints.storage import replace_folder, write_json, write_tensors
from llmos_fast.models.config import ModelConfig
from llmos_fast.models.family import Family
from llmos_fast.nn import empty_quantized_

METHOD = "llmos_fast"  # "quant_method" of our quantized checkpoints
_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are stored.

    layers: schemes, by name, of the layers that have another one than ``scheme``
    embeddings: whether embeddings are quantized, as linear layers are
    skip: names of layers that are not quantized; ``*`` matches anything
    """

    scheme: str
    group_size: int
    layers: dict[str, str] = field(default_factory=dict)
    embeddings: bool = False
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, dict):
            raise ValueError(
                f"Quantization: layers must be a dict of schemes by name, got {self.layers!r}"
            )
        if not isinstance(self.embeddings, bool):
            raise ValueError(f"Quantization: embeddings must be a bool, got {self.embeddings!r}")
        if not isinstance(self.skip, list) or not all(isinstance(name, str) for name in self.skip):
            raise ValueError(f"Quantization: skip must be a list of names, got {self.skip!r}")

    def empty_(self, model: nn.Module) -> None:
        """Quantize ``model`` so, in place, with weights of zeros for ``load_state_dict``."""
        empty_quantized_(
            model,
            self.scheme,
            self.group_size,
            self.layers,
            embeddings=self.embeddings,
            skip=self.skip,
        )


class Pretrained(nn.Module):
    """A model with the config that it was built from.

    Attributes:
        config: in our terms.
        family: whose names its parameters have in a checkpoint; None where ``build`` and ``load``
            did not make the model.
        hf_config: as Hugging Face's config.json.
        quantization: how its weights are stored; None where they are floating-point numbers.
    """

    config: ModelConfig
    family: Family | None = None
    hf_config: dict[str, Any]
    quantization: Quantization | None = None

    def save(self, folder: Path | str, tokenizer: Any = None) -> None:
        """Write a folder that ``load`` reads, all at once or not at all.

        ``transformers`` opens it too, where the weights are not quantized.

        tokenizer: written beside the model, by its ``save``

        Raises OSError where the disk refuses; what was in ``folder`` is then still there.
        """
        if self.family is None:
            raise ValueError("save: model must come from build or load, got one without a family")
        with replace_folder(Path(folder)) as partial:
            write_json(partial / "config.json", self._written_config())
            if tokenizer is not None:
                tokenizer.save(partial)
            if self.quantization is not None:
                write_tensors(partial / "model.safetensors", self.state_dict())
            else:
                _write_shards(partial, _named_as_theirs(self, self.family))

    def _written_config(self) -> dict[str, Any]:
        replaced = ("quantization_config", "torch_dtype")
        config = {k: v for k, v in self.hf_config.items() if k not in replaced}
        dtype = str(next(p for p in self.parameters() if p.is_floating_point()).dtype)[6:]
        config["dtype"] = dtype
        if self.quantization is not None:
            config["quantization_config"] = {"quant_method": METHOD, **vars(self.quantization)}
        return config


def _named_as_theirs(model: Pretrained, family: Family) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as Hugging Face stores them; what is tied once."""
    for name, parameter in model.named_parameters():
        tensor, sources = parameter.detach(), family.sources(name)
        if family.is_transposed(name):
            tensor = tensor.t()
        rows = model.config.projection_rows[-len(sources) :]
        parts = tensor.split(rows) if len(sources) > 1 else (tensor,)
        for source, part in zip(sources, parts, strict=True):
            yield family.prefixed(source), part


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        if size + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    shard_of: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        write_tensors(folder / file, shard)
        shard_of |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    text = json.dumps(index, indent=1)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
