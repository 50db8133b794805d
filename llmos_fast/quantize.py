"""Weight formats of the quantized linear op: the bit layout, ``quantize``, ``pack`` and ``unpack``.

A scheme is a format, and how activations enter the product:

    int8 int4 int4_asym                 activations are rounded to int8 per row, on the fly
    int8_a16 int4_a16 int4_asym_a16     activations stay in floating point
    nf4 fp8                             likewise ("nf4_a16", "fp8_a16" mean the same)

A weight W of shape (N, K), as in torch.nn.Linear, is stored as ``scale * level(code)``:

    format      code                         level            scale
    int8        int8, -127..127              code             amax / 127, row
    int4        nibble, 0..15                code - 8         amax / 7.5, group
    int4_asym   nibble, 0..15                code - zero      (max(w, 0) - min(w, 0)) / 15, group
    nf4         nibble, 0..15                NF4_LEVELS[code] amax, group
    fp8         byte, e4m3 (finite)          its value        amax / 448, row

A group is ``group_size`` consecutive weights of a row; the last group of a row may be short.
``packed`` is (N, K) int8 or uint8 for the 8-bit formats, and (N, ceil(K / 2)) uint8 for the 4-bit
ones: byte j of a row holds the code of k = 2j in its low nibble and of k = 2j + 1 in its high one
(0 where 2j + 1 = K). ``scales`` is fp32 (N, groups), ``zero_points`` uint8 (N, groups), 0..15.
The layout is the same on every device; kernels rearrange tiles of it as they read.

Sources: absmax rounding as in LLM.int8() (arXiv 2208.07339); NF4 from QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "int4_asym", "nf4", "fp8")
SCHEMES = tuple(f"{name}{suffix}" for name in FORMATS for suffix in ("", "_a16"))
GROUP_SIZES = (32, 64, 128)
FOUR_BIT = ("int4", "int4_asym", "nf4")
FP8_MAX = 448.0
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def format_of(scheme: str) -> str:
    """The weight format of a scheme: its name without "_a16"."""
    if scheme not in SCHEMES:
        raise ValueError(f"quantize: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    return scheme.removesuffix("_a16")


def rounds_activations(scheme: str) -> bool:
    """True where the scheme multiplies int8 activations (W8A8, W4A8)."""
    return scheme in ("int8", "int4", "int4_asym")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized (N, K) matrix; the module docstring says what the bits mean.

    ``group_size`` is K for the formats that scale whole rows.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    scheme: str
    group_size: int
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where the packed weight is."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """What a state_dict holds: "packed", "scales" and, for int4_asym, "zero_points"."""
        named = {"packed": self.packed, "scales": self.scales, "zero_points": self.zero_points}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        zero_points = None if self.zero_points is None else self.zero_points.to(device)
        return QuantizedWeight(
            self.packed.to(device),
            self.scales.to(device),
            zero_points,
            self.scheme,
            self.group_size,
            self.shape,
        )

    def check_values(self) -> None:
        """Raise ValueError for scales that are not finite: for weights that came from a file."""
        bad = int((~torch.isfinite(self.scales)).sum())
        if bad:
            raise ValueError(f"QuantizedWeight: scales must be finite, got {bad} of inf or NaN")

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output features ``start`` to ``stop`` (exclusive) as views: rows stand alone."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        packed, scales = self.packed[start:stop], self.scales[start:stop]
        shape = (packed.shape[0], self.shape[1])
        return QuantizedWeight(packed, scales, zero_points, self.scheme, self.group_size, shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) in ``dtype``: scale * level in fp32 (fp64 for fp64), rounded once."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return (levels(self, compute) * _spread(self.scales.to(compute), self)).to(dtype)


def empty(
    shape: tuple[int, int], scheme: str, group_size: int, device: torch.device | str | None = None
) -> QuantizedWeight:
    """A weight whose codes and scales are all 0, to be filled from a state_dict."""
    name = format_of(scheme)
    n, k = shape
    four_bit = name in FOUR_BIT
    group = group_size if four_bit else k
    groups = -(-k // group)
    columns = (k + 1) // 2 if four_bit else k
    packed_dtype = torch.int8 if name == "int8" else torch.uint8
    packed = torch.zeros(n, columns, dtype=packed_dtype, device=device)
    scales = torch.zeros(n, groups, device=device)
    zeros = torch.zeros(n, groups, dtype=torch.uint8, device=device)
    zero_points = zeros if name == "int4_asym" else None
    return QuantizedWeight(packed, scales, zero_points, scheme, group, shape)


def levels(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """(N, K) in ``dtype``: what the codes stand for, before the scales."""
    name = format_of(weight.scheme)
    if name == "fp8":
        return weight.packed.view(torch.float8_e4m3fn).to(dtype)
    if name == "int8":
        return weight.packed.to(dtype)
    codes = unpack(weight.packed, weight.shape[1])
    if name == "nf4":
        return torch.tensor(NF4_LEVELS, device=codes.device).to(dtype)[codes.int()]
    if name == "int4":
        return codes.to(dtype) - 8
    assert weight.zero_points is not None
    return codes.to(dtype) - _spread(weight.zero_points.to(dtype), weight)


def _spread(per_group: Tensor, weight: QuantizedWeight) -> Tensor:
    """(N, groups) -> broadcastable to (N, K): every group's value at each of its weights."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(weight.group_size, dim=1)[:, : weight.shape[1]]


def pack(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 (N, K) -> uint8 (N, ceil(K / 2)), low nibble first."""
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(
            f"pack: codes must be 2-D uint8, got {codes.ndim}-D {str(codes.dtype)[6:]}"
        )
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"pack: codes must be at most 15, got {int(codes.max())}")
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """uint8 (N, ceil(columns / 2)) -> codes uint8 (N, columns): the inverse of ``pack``."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != (columns + 1) // 2:
        raise ValueError(
            f"unpack: packed must be uint8 of shape (N, {(columns + 1) // 2}) for {columns} "
            f"columns, got {str(packed.dtype)[6:]} {tuple(packed.shape)}"
        )
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]


def quantize(weight: Tensor, scheme: str = "int8", group_size: int = 128) -> QuantizedWeight:
    """Quantize a floating-point (N, K) weight by rounding to the nearest level.

    ``group_size`` (32, 64 or 128) counts for the 4-bit formats; int8 and fp8 scale whole rows.
    A row or group of zeros gets scale 0. Raises ValueError for weights that are not 2-D, not
    floating point, empty, or not finite, and for an unknown scheme or group size.
    """
    name = format_of(scheme)
    _check(weight, group_size)
    n, k = weight.shape
    group = group_size if name in FOUR_BIT else k
    if name not in FOUR_BIT:
        grouped = weight.detach().float()[:, None, :]
    else:
        grouped = torch.nn.functional.pad(weight.detach().float(), (0, -k % group))
        grouped = grouped.unflatten(1, (-1, group))
    codes, scales, zeros = _encode(name, grouped)
    codes = codes.flatten(1)[:, :k]
    packed = pack(codes) if name in FOUR_BIT else codes.contiguous()
    return QuantizedWeight(packed, scales, zeros, scheme, group, (n, k))


def _check(weight: Tensor, group_size: int) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"quantize: weight must be a non-empty (N, K), got shape {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"quantize: weight must be floating point, got {weight.dtype}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"quantize: group_size must be 32, 64 or 128, got {group_size!r}")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(f"quantize: weight must be finite, got {bad} values of inf or NaN")


def _encode(name: str, grouped: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """fp32 (N, groups, group) -> codes likewise, scales (N, groups), zero points or None."""
    if name == "int4_asym":
        low = grouped.amin(-1).clamp(max=0)
        high = grouped.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        inverse = _inverse(scales)
        zeros = (-low * inverse).round().clamp(0, 15)
        codes = (grouped * inverse[..., None]).round() + zeros[..., None]
        return codes.clamp(0, 15).to(torch.uint8), scales, zeros.to(torch.uint8)
    amax = grouped.abs().amax(-1)
    divisor = {"int8": 127.0, "int4": 7.5, "nf4": 1.0, "fp8": FP8_MAX}[name]
    scales = amax / divisor
    scaled = grouped * _inverse(scales)[..., None]
    if name == "int8":
        return scaled.round().clamp(-127, 127).to(torch.int8), scales, None
    if name == "int4":
        return (scaled.round() + 8).clamp(0, 15).to(torch.uint8), scales, None
    if name == "nf4":
        table = torch.tensor(NF4_LEVELS, device=grouped.device)
        return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8), scales, None
    fp8 = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return fp8.view(torch.uint8), scales, None


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is too small for that."""
    inverse = 1 / scales
    return torch.where(torch.isfinite(inverse), inverse, 0)
