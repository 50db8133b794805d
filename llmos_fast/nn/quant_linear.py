"""torch.nn.Linear with a quantized, frozen weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmos_fast.ops.quant_matmul import quant_matmul
from llmos_fast.quantize import QuantizedWeight, empty, quantize


class QuantLinear(nn.Module):
    """y = x W^T + bias, W in one of the schemes of ``llmos_fast.quantize``.

    x: Float[... in_features] -> Float[... out_features], as ``ops.quant_matmul`` says.

    ``packed``, ``scales`` and ``zero_points`` are buffers, ``bias`` a parameter; all of them, and
    the scheme's name as bytes, are in the state_dict, so safetensors can hold it. The weight takes
    no gradient; x and bias do. ``scales`` keep their dtype when the module is cast. There is no
    ``weight``: use ``qweight``, or ``dequantize()`` for an nn.Linear.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str = "int8",
        group_size: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Everything 0, to be filled by ``load_state_dict``; ``from_float`` quantizes a weight."""
        super().__init__()
        weight = empty((out_features, in_features), scheme, group_size, device)
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self._fill(weight, None if values is None else nn.Parameter(values))

    def _fill(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.scheme, self.group_size = weight.scheme, weight.group_size
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zero_points", weight.zero_points)
        self.register_parameter("bias", bias)
        self._qweight = weight

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        scheme: str,
        group_size: int = 128,
        method: str = "mse",
    ) -> QuantLinear:
        """Quantize ``weight`` (out_features, in_features); ``bias`` is shared, not copied."""
        return cls.from_quantized(quantize(weight, scheme, group_size, method), bias)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> QuantLinear:
        """A layer of tensors that exist; neither is copied."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.detach())
        layer._fill(weight, bias)
        return layer

    @property
    def qweight(self) -> QuantizedWeight:
        """The weight as ``ops.quant_matmul`` takes it; the tensors are the module's own."""
        known, packed, scales = self._qweight, self.packed, self.scales
        zeros = self.zero_points
        if known.packed is packed and known.scales is scales and known.zero_points is zeros:
            return known
        known = replace(known, packed=packed, scales=scales, zero_points=zeros)
        if not torch.compiler.is_compiling():
            self._qweight = known
        return known

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        """Float[... in_features] -> Float[... out_features], through ``activation`` in one pass."""
        return quant_matmul(x, self.qweight, self.bias, activation=activation)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An nn.Linear with the rounded weight, in ``dtype`` or else the bias's, or else fp32."""
        if dtype is None:
            dtype = torch.float32 if self.bias is None else self.bias.dtype
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.qweight.dequantize(dtype))
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Shape and scheme, as printed."""
        group = f", group_size={self.group_size}" if self.group_size != self.in_features else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}{group}"
        )

    def get_extra_state(self) -> Tensor:
        """The scheme's name as bytes: int4 and nf4 have the same shapes, but other levels."""
        return torch.tensor(list(self.scheme.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state_dict of another scheme."""
        saved = bytes(state.tolist()).decode()
        if saved != self.scheme:
            raise ValueError(f"QuantLinear: state_dict must hold {self.scheme}, got {saved}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.qweight.check_values()

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        exact = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != exact.dtype:
            self.scales = exact.to(self.scales.device)
        self._qweight = self.qweight  # lets go of what the buffers were before
        return self
