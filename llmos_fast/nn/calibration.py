"""What calibration data tells about the linear layers of a model: GPTQ's weights, and mixed bits.

While data runs, a ``StandIn`` is in the place of every linear layer, packed projections included,
so that inputs are seen whichever way a model calls its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmos_fast import ops
from llmos_fast.nn.gptq import gptq
from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.nn.replace import replace_linears_, restore_linears_
from llmos_fast.quantize import QuantizedWeight, empty, quantize, rounds_activations


class StandIn(nn.Module):
    """A linear layer that shows its inputs and computes with ``quantized`` where that is set."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = _as_parameter(weight)
        self.bias = None if bias is None else _as_parameter(bias)
        self.quantized: QuantLinear | None = None
        self.show: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Float[... in_features] -> Float[... out_features]."""
        if self.show is not None:
            self.show(x)
        if self.quantized is not None:
            return self.quantized(x)  # type: ignore[no-any-return]
        return ops.linear(x, self.weight, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The linear layer with the parameters that this one was made of."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, self.bias is not None, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())


@contextmanager
def stand_ins(model: nn.Module, skip: Sequence[str]) -> Iterator[dict[str, StandIn]]:
    """By name, what stands for the linear layers of ``model`` inside the block.

    The model is in evaluation mode there and as it was afterwards, its Linear objects aside.
    """
    found: dict[str, StandIn] = {}
    modes = {module: module.training for module in model.modules()}

    def make(name: str, weight: Tensor, bias: Tensor | None) -> StandIn:
        return found.setdefault(name, StandIn(weight, bias))

    try:
        replace_linears_(model, make, skip)
        model.eval()
        with torch.no_grad():
            yield found
    finally:
        restore_linears_(model, StandIn)
        for module, mode in modes.items():
            module.training = mode


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` of one calibration input: a tensor, or positional or named arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    raise ValueError(
        "quantize_: calibration must hold tensors, or tuples or dicts of arguments, "
        f"got {type(inputs).__name__}"
    )


class _SeenEnoughError(Exception):
    """What follows in this call of the model is of no interest."""


def gptq_weights(
    model: nn.Module,
    calibration: Sequence[Any],
    scheme: str,
    schemes: Mapping[str, str],
    group_size: int,
    skip: Sequence[str],
) -> dict[str, QuantizedWeight]:
    """GPTQ's weights, by the name of the layer, of every layer that calibration data reaches.

    Layers are rounded in the order in which they run, each after those before it, whose errors its
    inputs then show. Every layer costs the calls of the model up to it, and memory for one
    (in_features, in_features) matrix.
    """
    weights: dict[str, QuantizedWeight] = {}
    with stand_ins(model, skip) as layers:
        pending = _running_order(model, calibration, layers)
        while pending:
            name = pending.pop(0)
            hessian = _hessian(model, calibration, layers[name], [layers[n] for n in pending])
            layer = layers[name]
            weights[name] = gptq(layer.weight, hessian, schemes.get(name, scheme), group_size)
            layer.quantized = QuantLinear.from_quantized(weights[name], layer.bias)
    return weights


def _running_order(
    model: nn.Module, calibration: Sequence[Any], layers: Mapping[str, StandIn]
) -> list[str]:
    seen: dict[str, None] = {}
    for name, layer in layers.items():
        layer.show = lambda _, name=name: seen.setdefault(name)
    for inputs in calibration:
        call(model, inputs)
    for layer in layers.values():
        layer.show = None
    return list(seen)


def _hessian(
    model: nn.Module, calibration: Sequence[Any], layer: StandIn, later: Sequence[StandIn]
) -> Tensor:
    """fp32 (in_features, in_features): X^T X of all inputs of ``layer``; ``later`` ones stop."""
    k = layer.weight.shape[1]
    total = torch.zeros(k, k, device=layer.weight.device)

    def add(x: Tensor) -> None:
        rows = x.reshape(-1, k).float()
        total.addmm_(rows.T, rows)

    def stop(_: Tensor) -> None:
        raise _SeenEnoughError

    layer.show = add
    for other in later:
        other.show = stop
    for inputs in calibration:
        try:
            call(model, inputs)
        except _SeenEnoughError:
            continue
    for one in (layer, *later):
        one.show = None
    return total


def mixed_schemes(
    model: nn.Module,
    calibration: Sequence[Any],
    scheme: str,
    group_size: int,
    bits: float,
    skip: Sequence[str],
) -> dict[str, str]:
    """The scheme of every layer, so that their weights take at most ``bits`` bits on average.

    The layers that gain the most accuracy per bit get int8: what is gained is the squared error of
    the model's output where only that layer is in ``scheme``.
    """
    wide = "int8" if rounds_activations(scheme) else "int8_a16"
    with stand_ins(model, skip) as layers:
        narrow = {n: quantize(layer.weight, scheme, group_size) for n, layer in layers.items()}
        errors = _output_errors(model, calibration, layers, narrow)
    extra = {
        name: empty(weight.shape, wide, group_size, "meta").nbytes - weight.nbytes
        for name, weight in narrow.items()
    }
    numel = sum(weight.shape[0] * weight.shape[1] for weight in narrow.values())
    spare = bits * numel / 8 - sum(weight.nbytes for weight in narrow.values())
    if spare < 0:
        least = bits - 8 * spare / numel
        raise ValueError(
            f"quantize_: bits must be at least {least:.3f}, what {scheme} takes, got {bits}"
        )
    schemes = dict.fromkeys(narrow, scheme)
    for name in sorted(narrow, key=lambda name: errors[name] / extra[name], reverse=True):
        if extra[name] <= spare:
            spare -= extra[name]
            schemes[name] = wide
    return schemes


def _output_errors(
    model: nn.Module,
    calibration: Sequence[Any],
    layers: Mapping[str, StandIn],
    weights: Mapping[str, QuantizedWeight],
) -> dict[str, float]:
    """Squared error of the model's first output where only the layer of that name is rounded."""
    errors = dict.fromkeys(weights, 0.0)
    for inputs in calibration:
        expected = _first_tensor(call(model, inputs))
        for name, layer in layers.items():
            layer.quantized = QuantLinear.from_quantized(weights[name], layer.bias)
            difference = _first_tensor(call(model, inputs)) - expected
            errors[name] += difference.float().square().sum().item()
            layer.quantized = None
    return errors


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output
