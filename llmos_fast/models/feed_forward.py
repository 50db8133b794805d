"""The feed-forward network of a block."""

from __future__ import annotations

from torch import Tensor, nn

from llmos_fast.models.config import ModelConfig
from llmos_fast.nn.ffn import activation_function, feed_forward
from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.quantize import can_interleave, interleave, separate


class FeedForward(nn.Module):
    """linear2(activation(linear1(x))), times linear_up(x) where gated; as ``nn.feed_forward``.

    Quantized, linear1 and linear_up are one weight from ``interleave``, ``gate_up``, so that gate
    and product stay in registers; where their shapes or schemes allow it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.width, config.inner, bias=config.inner_bias)
        if config.gated:
            self.linear_up = nn.Linear(config.width, config.inner, bias=config.inner_bias)
        self.linear2 = nn.Linear(config.inner, config.width, bias=config.inner_bias)
        self.dropout = nn.Dropout(0.0)
        self.activation = activation_function("FeedForward", config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Float[... width] -> Float[... width]."""
        return feed_forward(self, x)

    def join_projections_(self) -> None:
        """Make one weight of linear1 and linear_up where both are quantized alike."""
        gate, up = self._modules.get("linear1"), self._modules.get("linear_up")
        if (
            isinstance(gate, QuantLinear)
            and isinstance(up, QuantLinear)
            and gate.bias is None
            and can_interleave(gate.qweight, up.qweight)
        ):
            del self.linear1, self.linear_up
            self.gate_up = QuantLinear.from_quantized(interleave(gate.qweight, up.qweight), None)

    def separate_projections_(self) -> None:
        """The inverse."""
        if "gate_up" in self._modules:
            gate, up = separate(self.gate_up.qweight)
            del self.gate_up
            for name, weight in (("linear1", gate), ("linear_up", up)):
                setattr(self, name, QuantLinear.from_quantized(weight, None))
