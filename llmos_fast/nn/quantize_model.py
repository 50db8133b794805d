"""``quantize_`` and ``dequantize_``: every nn.Linear of a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmos_fast.formats import FOUR_BIT
from llmos_fast.nn.calibration import gptq_weights, mixed_schemes
from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.nn.replace import replace_linears_, restore_linears_
from llmos_fast.quantize import QuantizedWeight, format_of, quantize
from llmos_fast.rounding import METHODS


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight; ``error`` is |W - W'| / |W| in the Frobenius norm."""

    name: str
    scheme: str
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

    @property
    def bits(self) -> float:
        """Average of a quantized weight, scales included."""
        count = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return 8 * sum(layer.bytes_after for layer in self.layers) / max(1, count)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [
            f"{'layer':{width}}  {'scheme':13}  {'shape':>13}  {'MB before':>9}  {'after':>7}  "
            f"{'error':>8}"
        ]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            lines.append(
                f"{layer.name:{width}}  {layer.scheme:13}  {shape:>13}  "
                f"{layer.bytes_before / 1e6:9.3f}  {layer.bytes_after / 1e6:7.3f}  "
                f"{layer.error:8.1e}"
            )
        lines.append(
            f"{self.scheme}: {len(self.layers)} weights of {self.bits:.2f} bits; the model went "
            f"from {self.bytes_before / 1e6:.3f} to {self.bytes_after / 1e6:.3f} MB"
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def quantize_(
    model: nn.Module,
    scheme: str = "int8",
    group_size: int = 128,
    skip: Sequence[str] = (),
    *,
    method: str | None = None,
    calibration: Iterable[Any] | None = None,
    bits: float | None = None,
) -> QuantizationReport:
    """Replace every nn.Linear inside ``model`` by a QuantLinear, in place.

    skip: names of layers that stay as they are; ``*`` matches anything ("decoder.*")
    method: how weights are rounded: "absmax" or "mse", as ``llmos_fast.quantize`` says, or "gptq"
        (Frantar et al., arXiv 2210.17323), which needs ``calibration`` and is the default with it
    calibration: inputs of the model, some dozens of typical ones: each a tensor, a tuple of
        positional arguments or a dict of named ones
    bits: average per weight, scales included; the layers whose rounding to a 4-bit ``scheme``
        changes the model's first output most, per bit, on ``calibration``, are given 8 bits
        instead, until the average is reached

    A Linear whose weight is also another layer's (a tied output projection) is quantized, and the
    other layer keeps the floating-point weight. The ``out_proj`` of torch.nn.MultiheadAttention is
    left alone, because that layer reads its weight and never calls it; so are subclasses of
    Linear. torch.nn.TransformerEncoderLayer leaves its fused inference path, which also reads
    weights. A layer with packed projections of its own may define

        quantize_projections_(quantize_weight)    quantize_weight(name, weight, bias) -> QuantLinear
        dequantize_projections_()

    Raises ValueError for an unknown scheme, group size or method, for weights that are not finite,
    for ``bits`` below what the scheme takes, and where ``model`` is itself a Linear; without
    calibration, layers before a bad weight stay quantized.
    """
    data = None if calibration is None else list(calibration)
    method = _check(model, scheme, method, data, bits)
    report = QuantizationReport(scheme, bytes_before=_bytes(model))
    schemes: dict[str, str] = {}
    weights: dict[str, QuantizedWeight] = {}
    if data is not None and bits is not None:
        schemes = mixed_schemes(model, data, scheme, group_size, bits, skip)
    if data is not None and method == "gptq":
        weights = gptq_weights(model, data, scheme, schemes, group_size, skip)

    def quantized(name: str, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        if method == "gptq" and name not in weights:
            report.notes.append(f"{name} does not run on the calibration data: rounded without it")
        qweight = weights.pop(name, None)
        if qweight is None:
            rounding = "mse" if method == "gptq" else method
            qweight = quantize(weight, schemes.get(name, scheme), group_size, rounding)
        layer = QuantLinear.from_quantized(qweight, bias)
        report.layers.append(_measure(name, weight, layer))
        return layer

    report.notes.extend(replace_linears_(model, quantized, skip))
    report.bytes_after = _bytes(model)
    return report


def empty_quantized_(
    model: nn.Module, scheme: str, group_size: int, schemes: Mapping[str, str] | None = None
) -> None:
    """Replace every nn.Linear inside ``model`` by a QuantLinear of zeros, for ``load_state_dict``.

    schemes: of the layers, by name, that have another one than ``scheme``

    Raises ValueError for an unknown scheme or group size, and for a name that no layer has.
    """
    unknown = dict(schemes or {})

    def empty(name: str, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        out_features, in_features = weight.shape
        layer = QuantLinear(
            in_features, out_features, False, unknown.pop(name, scheme), group_size, weight.device
        )
        layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    replace_linears_(model, empty)
    if unknown:
        raise ValueError(f"empty_quantized_: schemes must name layers, got {', '.join(unknown)}")


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every QuantLinear inside ``model`` by an nn.Linear with the rounded weight.

    dtype: of the weights; None takes the bias's, or fp32 without one. Ties are not restored.
    """
    if isinstance(model, QuantLinear):
        raise ValueError("dequantize_: model must contain its layers, got a QuantLinear")
    restore_linears_(model, QuantLinear, dtype)
    return model


def _check(
    model: nn.Module,
    scheme: str,
    method: str | None,
    data: list[Any] | None,
    bits: float | None,
) -> str:
    """The method, after everything that can be refused before the model is touched."""
    name = format_of(scheme)
    if isinstance(model, nn.Linear):
        raise ValueError("quantize_: model must contain its Linear layers, got a Linear")
    if data is not None and not data:
        raise ValueError("quantize_: calibration must hold at least one input, got none")
    if method is None:
        method = "mse" if data is None else "gptq"
    if method not in (*METHODS, "gptq"):
        known = ", ".join((*METHODS, "gptq"))
        raise ValueError(f"quantize_: method must be one of {known}, got {method!r}")
    if data is None and (method == "gptq" or bits is not None):
        asking = "method='gptq'" if bits is None else f"bits={bits}"
        raise ValueError(f"quantize_: calibration must be given for {asking}, got None")
    if bits is not None and name not in FOUR_BIT:
        raise ValueError(f"quantize_: scheme must be a 4-bit one for bits={bits}, got {scheme!r}")
    return method


def _measure(name: str, weight: Tensor, layer: QuantLinear) -> LayerReport:
    wide = weight.detach().float()
    norm = wide.norm().item()
    error = (layer.qweight.dequantize() - wide).norm().item() / norm if norm else 0.0
    shape = (layer.out_features, layer.in_features)
    return LayerReport(name, layer.scheme, shape, weight.nbytes, layer.qweight.nbytes, error)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
