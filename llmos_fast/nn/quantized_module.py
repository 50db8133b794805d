"""What modules with a quantized, frozen weight have in common: how it is kept and stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmos_fast.quantize import QuantizedWeight


class QuantizedModule(nn.Module):
    """Keeps a ``QuantizedWeight`` as buffers, which take no gradient.

    ``packed``, ``scales`` and ``zero_points``, and the scheme's name as bytes, are in the
    state_dict, so safetensors can hold it. ``scales`` keep their dtype when the module is cast.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def _store(self, weight: QuantizedWeight) -> None:
        self.scheme, self.group_size = weight.scheme, weight.group_size
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zero_points", weight.zero_points)
        self._qweight = weight

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

    def get_extra_state(self) -> Tensor:
        """The scheme's name as bytes: int4 and nf4 have the same shapes, but other levels."""
        return torch.tensor(list(self.scheme.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a state_dict of another scheme."""
        saved = bytes(state.tolist()).decode()
        if saved != self.scheme:
            name = type(self).__name__
            raise ValueError(f"{name}: state_dict must hold {self.scheme}, got {saved}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.qweight.check_values()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        exact = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != exact.dtype:
            self.scales = exact.to(self.scales.device)
        self._qweight = self.qweight  # lets go of what the buffers were before
        return self
