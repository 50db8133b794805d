"""Other modules in the place of a model's linear layers and embeddings, and these again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmos_fast.nn.quant_embedding import QuantEmbedding, refusal

Kind = TypeVar("Kind", bound=nn.Module)


class MakeLayer(Protocol):
    """Makes what stands in the place of a linear layer, from its full name and parameters."""

    def __call__(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module: ...  # noqa: D102


def replace_linears_(
    model: nn.Module, make: MakeLayer, skip: Sequence[str] = (), tables: Collection[int] = ()
) -> list[str]:
    """Put ``make(name, weight, bias)`` in the place of every linear layer inside ``model``.

    tables: ids of the weights of embeddings that will be replaced too

    A layer with packed projections of its own may define ``quantize_projections_`` and
    ``dequantize_projections_`` as ``nn.MultiheadAttention`` of this package does; one that computes
    two of its linear layers as one may define ``join_projections_`` and ``separate_projections_``,
    as ``models.FeedForward`` does.

    returns: a sentence about every layer that ``quantize_`` treats in a way that may surprise
    """
    notes = []
    owners = _owners(model)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if hasattr(module, "quantize_projections_") and not _matches(name, skip):
            prefix = f"{name}." if name else ""
            module.quantize_projections_(
                lambda part, weight, bias, prefix=prefix: make(prefix + part, weight, bias)
            )
    for name, parent, attribute, child in list(_places(model, nn.Linear)):
        reason = _reason_to_skip(name, parent, child, skip)
        if reason is not None:
            notes.append(f"{name} is left as it is: {reason}")
            continue
        others = [owner for owner in owners[id(child.weight)] if owner != f"{name}.weight"]
        if child not in replaced:
            if others and id(child.weight) not in tables:
                notes.append(f"{name} was tied to {', '.join(others)}, which stays float")
            replaced[child] = make(name, child.weight, child.bias).train(child.training)
        setattr(parent, attribute, replaced[child])
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # torch's own sign that the fused path is off
    for module in list(model.modules()):
        if hasattr(module, "join_projections_"):
            module.join_projections_()  # type: ignore[operator]
    return notes


def replace_embeddings_(
    model: nn.Module, make: Callable[[str, nn.Embedding], nn.Module], skip: Sequence[str] = ()
) -> list[str]:
    """Put ``make(name, embedding)`` in the place of every embedding inside ``model``.

    returns: sentences, as ``replace_linears_`` does
    """
    notes = []
    owners = _owners(model)
    replaced: dict[nn.Module, nn.Module] = {}
    places = list(_places(model, nn.Embedding))
    tables = {f"{name}.weight" for name, _, _, e in places if _reason(name, e, skip) is None}
    for name, parent, attribute, child in places:
        reason = _reason(name, child, skip)
        if reason is not None:
            notes.append(f"{name} is left as it is: {reason}")
            continue
        if child not in replaced:
            others = [owner for owner in owners[id(child.weight)] if owner not in tables]
            if others:
                notes.append(f"{name} was tied to {', '.join(others)}, which stays float")
            replaced[child] = make(name, child).train(child.training)
        setattr(parent, attribute, replaced[child])
    return notes


def embedding_tables(model: nn.Module, skip: Sequence[str] = ()) -> dict[int, Tensor]:
    """The weights, by id, of the embeddings that ``replace_embeddings_`` replaces."""
    places = _places(model, nn.Embedding)
    return {id(e.weight): e.weight for name, _, _, e in places if _reason(name, e, skip) is None}


def restore_embeddings_(
    model: nn.Module, linears: Mapping[nn.Module, nn.Linear], dtype: torch.dtype | None = None
) -> None:
    """Put ``layer.dequantize(dtype)`` in the place of every QuantEmbedding, with what was tied.

    linears: what ``restore_linears_`` returned
    """
    restored: dict[nn.Module, nn.Embedding] = {}
    places = list(_places(model, QuantEmbedding))
    for _, parent, attribute, child in places:
        if child not in restored:
            restored[child] = child.dequantize(dtype)
        setattr(parent, attribute, restored[child])
    for _, _, _, child in places:
        for other in child.tied:
            tied = linears.get(other) or restored.get(other)
            if tied is not None:
                tied.weight = restored[child].weight


def restore_linears_(
    model: nn.Module, kind: type[nn.Module], dtype: torch.dtype | None = None
) -> dict[nn.Module, nn.Linear]:
    """Put ``layer.dequantize(dtype)`` in the place of every layer of ``kind`` inside ``model``.

    returns: what stands for each of them now
    """
    restored: dict[nn.Module, nn.Linear] = {}
    for module in list(model.modules()):
        if hasattr(module, "separate_projections_"):
            module.separate_projections_()  # type: ignore[operator]
        holds = any(isinstance(child, kind) for child in module.children())
        if holds and hasattr(module, "dequantize_projections_"):
            module.dequantize_projections_()  # type: ignore[operator]
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, kind):
                if child not in restored:
                    restored[child] = child.dequantize(dtype)  # type: ignore[operator]
                setattr(parent, attribute, restored[child])
                if isinstance(parent, nn.TransformerEncoderLayer):
                    known = {nn.functional.relu: 1, nn.functional.gelu: 2}
                    parent.activation_relu_or_gelu = known.get(parent.activation, 0)
    return restored


def _places(model: nn.Module, kind: type[Kind]) -> Iterator[tuple[str, nn.Module, str, Kind]]:
    """(full name, parent, attribute, layer), once for every place that holds one of ``kind``."""
    for path, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, kind):
                yield (f"{path}.{attribute}" if path else attribute), parent, attribute, child


def _reason_to_skip(
    name: str, parent: nn.Module, child: nn.Linear, skip: Sequence[str]
) -> str | None:
    if _matches(name, skip):
        return "named in skip"
    if getattr(type(parent), "forward", None) is nn.MultiheadAttention.forward:
        return "torch.nn.MultiheadAttention reads its weight and never calls it"
    if type(child) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"{type(child).__name__} may do more than nn.Linear"
    return None


def _reason(name: str, child: nn.Embedding, skip: Sequence[str]) -> str | None:
    """Why an embedding stays."""
    if _matches(name, skip):
        return "named in skip"
    if type(child) is not nn.Embedding:
        return f"{type(child).__name__} may do more than nn.Embedding"
    option = refusal(child)
    return None if option is None else f"its replacement must not {option}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter, by the parameter's identity."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners
