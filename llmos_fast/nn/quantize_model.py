"""``quantize_`` and ``dequantize_``: linear layers and embeddings of a model, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmos_fast.formats import FOUR_BIT
from llmos_fast.nn.calibration import gptq_weights, mixed_schemes
from llmos_fast.nn.quant_embedding import QuantEmbedding
from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.nn.replace import (
    embedding_tables,
    replace_embeddings_,
    replace_linears_,
    restore_embeddings_,
    restore_linears_,
)
from llmos_fast.quantize import QuantizedWeight, empty, format_of, quantize
from llmos_fast.rounding import METHODS

MakeWeight = Callable[[str, Tensor], QuantizedWeight]


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
    embeddings: bool = False,
) -> QuantizationReport:
    """Replace every nn.Linear inside ``model`` by a QuantLinear, in place.

    skip: names of layers that stay as they are; ``*`` matches anything ("decoder.*")
    method: how weights are rounded: "absmax" or "mse", as ``llmos_fast.quantize`` says, or "gptq"
        (Frantar et al., arXiv 2210.17323), which needs ``calibration`` and is the default with it
    calibration: inputs of the model, some dozens of typical ones: each a tensor, a tuple of
        positional arguments or a dict of named ones
    bits: average per weight, scales included; the layers whose rounding to a 4-bit ``scheme``
        changes the model's first output most, per bit, on ``calibration``, are given 8 bits
        instead, until the average is reached; embeddings of their own do not count
    embeddings: replace every nn.Embedding by a QuantEmbedding as well, without calibration

    A Linear whose weight is also an embedding's (a tied output projection) shares the quantized
    weight with the QuantEmbedding; a layer that is not replaced keeps the floating-point one. The
    ``out_proj`` of torch.nn.MultiheadAttention is left alone, because that layer reads its weight
    and never calls it; so are subclasses of Linear and Embedding, and embeddings with max_norm,
    scale_grad_by_freq or sparse. torch.nn.TransformerEncoderLayer leaves its fused inference path,
    which also reads weights. A layer with packed projections of its own may define

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

    def rounded(name: str, weight: Tensor) -> QuantizedWeight:
        qweight = weights.pop(name, None)
        if qweight is None:
            rounding = "mse" if method == "gptq" else method
            qweight = quantize(weight, schemes.get(name, scheme), group_size, rounding)
        report.layers.append(_measure(name, weight, qweight))
        return qweight

    def calibrated(name: str, weight: Tensor) -> QuantizedWeight:
        if method == "gptq" and name not in weights:
            report.notes.append(f"{name} does not run on the calibration data: rounded without it")
        return rounded(name, weight)

    report.notes.extend(
        replace_by_quantized_(model, calibrated, rounded if embeddings else None, skip)
    )
    report.bytes_after = _bytes(model)
    return report


def replace_by_quantized_(
    model: nn.Module, weight_of: MakeWeight, table_of: MakeWeight | None, skip: Sequence[str] = ()
) -> list[str]:
    """Put quantized layers in the place of linear layers, and of embeddings with ``table_of``.

    What has the weight of an embedding gets one quantized weight together with it.
    """
    tables = {} if table_of is None else embedding_tables(model, skip)
    readers: dict[int, list[QuantLinear | QuantEmbedding]] = {key: [] for key in tables}

    def linear(name: str, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        others = readers.get(id(weight), [])
        qweight = others[0].qweight if others else weight_of(name, weight)
        layer = QuantLinear.from_quantized(qweight, bias)
        others.append(layer)
        return layer

    def embedding(name: str, old: nn.Embedding) -> QuantEmbedding:
        assert table_of is not None
        others = readers[id(old.weight)]
        table = others[0].qweight if others else table_of(name, old.weight)
        layer = QuantEmbedding.from_quantized(table, old.padding_idx, old.weight.dtype)
        for other in others:
            layer.tie(other)
        others.append(layer)
        return layer

    notes = replace_linears_(model, linear, skip, tables)
    return notes if table_of is None else notes + replace_embeddings_(model, embedding, skip)


def empty_quantized_(
    model: nn.Module,
    scheme: str,
    group_size: int,
    schemes: Mapping[str, str] | None = None,
    *,
    embeddings: bool = False,
    skip: Sequence[str] = (),
) -> None:
    """Do what ``quantize_`` does, with weights of zeros, for ``load_state_dict``.

    schemes: of the layers, by name, that have another one than ``scheme``

    Raises ValueError for an unknown scheme or group size, and for a name that no layer has.
    """
    unknown = dict(schemes or {})

    def zeros(name: str, weight: Tensor) -> QuantizedWeight:
        n, k = weight.shape
        return empty((n, k), unknown.pop(name, scheme), group_size, weight.device)

    replace_by_quantized_(model, zeros, zeros if embeddings else None, skip)
    if unknown:
        raise ValueError(f"empty_quantized_: schemes must name layers, got {', '.join(unknown)}")


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every QuantLinear and QuantEmbedding by a layer of torch's with the rounded weight.

    dtype: of the weights; None takes an embedding's or a bias's, or else fp32. What shares a
    quantized weight with an embedding is tied to it again.
    """
    if isinstance(model, QuantLinear | QuantEmbedding):
        kind = type(model).__name__
        raise ValueError(f"dequantize_: model must contain its layers, got a {kind}")
    linears = restore_linears_(model, QuantLinear, dtype)
    restore_embeddings_(model, linears, dtype)
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
    if isinstance(model, nn.Embedding):
        raise ValueError("quantize_: model must contain its embeddings, got an Embedding")
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


def _measure(name: str, weight: Tensor, qweight: QuantizedWeight) -> LayerReport:
    wide = weight.detach().float()
    norm = wide.norm().item()
    error = (qweight.dequantize() - wide).norm().item() / norm if norm else 0.0
    size = weight.nbytes, qweight.nbytes
    return LayerReport(name, qweight.scheme, qweight.shape, *size, error)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
