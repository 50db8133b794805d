"""torch.nn.Linear with a quantized, frozen weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmos_fast.nn.quantized_module import QuantizedModule
from llmos_fast.ops.quant_matmul import quant_matmul
from llmos_fast.quantize import QuantizedWeight, empty, quantize


class QuantLinear(QuantizedModule):
    """y = x W^T + bias, W in one of the schemes of ``llmos_fast.quantize``.

    x: Float[... in_features] -> Float[... out_features], as ``ops.quant_matmul`` says.

    ``bias`` is a parameter, which trains; the weight is kept as in ``QuantizedModule``. There is no
    ``weight``: use ``qweight``, or ``dequantize()`` for an nn.Linear.
    """

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
        self._store(weight)
        self.register_parameter("bias", bias)

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

    def forward(self, x: Tensor, activation: str | None = None, gated: bool = False) -> Tensor:
        """Float[... in_features] -> Float[... out_features], through ``activation`` in one pass.

        gated: the weight is a pair from ``interleave``, and the result half as wide
        """
        return quant_matmul(x, self.qweight, self.bias, activation=activation, gated=gated)

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
