"""``quantize_`` and ``dequantize_``: every nn.Linear of a model, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.quantize import format_of


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight; ``error`` is |W - W'| / |W| in the Frobenius norm."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    error: float


@dataclass
class QuantizationReport:
    """What ``quantize_`` did. Totals count every tensor of the model once; ``print`` it."""

    scheme: str
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'shape':>13}  {'MB before':>9}  {'after':>7}  {'error':>8}"]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {layer.bytes_before / 1e6:9.3f}  "
                f"{layer.bytes_after / 1e6:7.3f}  {layer.error:8.1e}"
            )
        lines.append(
            f"{self.scheme}: {len(self.layers)} weights; the model went from "
            f"{self.bytes_before / 1e6:.3f} to {self.bytes_after / 1e6:.3f} MB"
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def quantize_(
    model: nn.Module, scheme: str = "int8", group_size: int = 128, skip: Sequence[str] = ()
) -> QuantizationReport:
    """Replace every nn.Linear inside ``model`` by a QuantLinear, in place.

    skip: names of layers that stay as they are; ``*`` matches anything ("decoder.*")

    A Linear whose weight is also another layer's (a tied output projection) is quantized, and the
    other layer keeps the floating-point weight. The ``out_proj`` of torch.nn.MultiheadAttention is
    left alone, because that layer reads its weight and never calls it; so are subclasses of
    Linear. torch.nn.TransformerEncoderLayer leaves its fused inference path, which also reads
    weights. A layer with packed projections of its own may define

        quantize_projections_(quantize_weight)    quantize_weight(name, weight, bias) -> QuantLinear
        dequantize_projections_()

    Raises ValueError for an unknown scheme or group size, for weights that are not finite, and
    where ``model`` is itself a Linear; layers before the bad one stay quantized.
    """
    format_of(scheme)
    if isinstance(model, nn.Linear):
        raise ValueError("quantize_: model must contain its Linear layers, got a Linear")
    report = QuantizationReport(scheme, bytes_before=_bytes(model))
    owners = _owners(model)
    replaced: dict[nn.Module, QuantLinear] = {}

    def quantized(name: str, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        layer = QuantLinear.from_float(weight, bias, scheme, group_size)
        report.layers.append(_measure(name, weight, layer))
        return layer

    for name, module in list(model.named_modules()):
        if hasattr(module, "quantize_projections_") and not _matches(name, skip):
            prefix = f"{name}." if name else ""
            module.quantize_projections_(
                lambda part, weight, bias, prefix=prefix: quantized(prefix + part, weight, bias)
            )
    for name, parent, attribute, child in list(_linears(model)):
        reason = _reason_to_skip(name, parent, attribute, child, skip)
        if reason is not None:
            report.notes.append(f"{name} is left as it is: {reason}")
            continue
        others = [owner for owner in owners[id(child.weight)] if owner != f"{name}.weight"]
        if child not in replaced:
            if others:
                report.notes.append(f"{name} was tied to {', '.join(others)}, which stays float")
            layer = quantized(name, child.weight, child.bias)
            replaced[child] = layer.train(child.training)
        setattr(parent, attribute, replaced[child])
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # torch's own sign that the fused path is off
    report.bytes_after = _bytes(model)
    return report


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every QuantLinear inside ``model`` by an nn.Linear with the rounded weight.

    dtype: of the weights; None takes the bias's, or fp32 without one. Ties are not restored.
    """
    if isinstance(model, QuantLinear):
        raise ValueError("dequantize_: model must contain its layers, got a QuantLinear")
    restored: dict[QuantLinear, nn.Linear] = {}
    for module in list(model.modules()):
        if hasattr(module, "dequantize_projections_"):
            module.dequantize_projections_()  # type: ignore[operator]
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, QuantLinear):
                if child not in restored:
                    restored[child] = child.dequantize(dtype)
                setattr(parent, attribute, restored[child])
                if isinstance(parent, nn.TransformerEncoderLayer):
                    known = {nn.functional.relu: 1, nn.functional.gelu: 2}
                    parent.activation_relu_or_gelu = known.get(parent.activation, 0)
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """(full name, parent, attribute, layer), once for every place that holds a Linear."""
    for path, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                yield (f"{path}.{attribute}" if path else attribute), parent, attribute, child


def _reason_to_skip(
    name: str, parent: nn.Module, attribute: str, child: nn.Linear, skip: Sequence[str]
) -> str | None:
    if _matches(name, skip):
        return "named in skip"
    if getattr(type(parent), "forward", None) is nn.MultiheadAttention.forward:
        return "torch.nn.MultiheadAttention reads its weight and never calls it"
    if type(child) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"{type(child).__name__} may do more than nn.Linear"
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter, by the parameter's identity."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _measure(name: str, weight: Tensor, layer: QuantLinear) -> LayerReport:
    wide = weight.detach().float()
    norm = wide.norm().item()
    error = (layer.qweight.dequantize() - wide).norm().item() / norm if norm else 0.0
    shape = (layer.out_features, layer.in_features)
    return LayerReport(name, shape, weight.nbytes, layer.qweight.nbytes, error)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
