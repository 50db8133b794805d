"""Cosines and sines of rotary positions, with the scalings that stretch them to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmos_fast.models.config import LARGEST_NUMBER, Rotary

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


class RotaryAngles:
    """Tables of a model's rotary positions, made when they are asked for and kept.

    Raises ValueError for a kind of scaling that is not known, and for one that is not complete.
    """

    def __init__(self, rotary: Rotary, max_length: int | None):
        self.rotary = rotary
        self.kind = str(rotary.scaling.get("rope_type", rotary.scaling.get("type", "default")))
        if self.kind not in KINDS:
            known = ", ".join(KINDS)
            raise ValueError(f"Rotary: scaling must be one of {known}, got {self.kind!r}")
        # dynamic scaling begins where the model's own limit is, whatever it was trained for
        self._original: float = max_length or 2048
        if self.kind != "dynamic":
            self._original = self._number("original_max_position_embeddings", self._original)
        self._tables: dict[torch.device, tuple[int, Tensor, Tensor]] = {}
        self._frequencies(2 * int(self._original))

    def tables(self, length: int, device: torch.device, room: int = 0) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the positions below ``length``, below ``room``, and perhaps more.

        length: of the longest sequence, by which dynamic scaling stretches
        returns: Float32[rows dim/2] each
        """
        stretched = max(length, int(self._original)) if self.kind == "dynamic" else 0
        rows = 1 << (max(length, room, 256) - 1).bit_length()
        of, cos, sin = self._tables.get(device, (0, None, None))
        if cos is None or sin is None or cos.shape[0] < rows or of != stretched:
            with torch.inference_mode(False), torch.no_grad():  # autograd will save them later
                frequency, magnitude = self._frequencies(stretched)
                angle = torch.outer(
                    torch.arange(rows, dtype=torch.float32, device="cpu"), frequency
                )
                cos = (angle.cos() * magnitude).to(device)
                sin = (angle.sin() * magnitude).to(device)
            self._tables[device] = stretched, cos, sin
        return cos, sin

    def _frequencies(self, length: int) -> tuple[Tensor, float]:
        """(radians per position of each pair of features, factor of cosines and sines)."""
        base, dim = self.rotary.base, self.rotary.dim
        if self.kind == "dynamic" and length > self._original:
            factor = self._number("factor")
            base *= (factor * length / self._original - (factor - 1)) ** (dim / max(dim - 2, 1))
        plain = base ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        if self.kind == "linear":
            return plain / self._number("factor"), 1.0
        if self.kind == "llama3":
            return self._llama3(plain), 1.0
        if self.kind == "yarn":
            return self._yarn(plain)
        return plain, 1.0

    def _llama3(self, plain: Tensor) -> Tensor:
        """Long wavelengths are stretched, short ones kept, those between mixed (Llama 3.1)."""
        low, high = self._number("low_freq_factor"), self._number("high_freq_factor")
        if not low < high:
            raise ValueError(f"Rotary: low_freq_factor must be below {high}, got {low}")
        turns = self._original * plain / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * ((1 - smooth) / self._number("factor") + smooth)

    def _yarn(self, plain: Tensor) -> tuple[Tensor, float]:
        """Peng et al. 2023 (arXiv 2309.00071), sections 3.2 and 3.4."""
        base, dim, factor = self.rotary.base, self.rotary.dim, self._number("factor")

        def feature(turns: float) -> float:
            """The pair of features that turns so often in the original context."""
            return dim * math.log(self._original / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = feature(self._number("beta_fast", 32)), feature(self._number("beta_slow", 1))
        if self.rotary.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(
            high - low, 0.001
        )
        kept = 1 - ramp.clamp(0, 1)
        return plain / factor * (1 - kept) + plain * kept, self._yarn_magnitude(factor)

    def _yarn_magnitude(self, factor: float) -> float:
        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        scaling = self.rotary.scaling
        if scaling.get("attention_factor") is not None:
            return self._number("attention_factor")
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            return magnitude(self._number("mscale")) / magnitude(self._number("mscale_all_dim"))
        return magnitude(1.0)

    def _number(self, name: str, default: float | None = None) -> float:
        value = self.rotary.scaling.get(name)
        value = default if value is None else value
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < LARGEST_NUMBER
        ):
            raise ValueError(f"Rotary: {name} must be positive for {self.kind}, got {value!r}")
        return float(value)
