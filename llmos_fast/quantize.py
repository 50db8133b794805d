"""Weight formats of the quantized linear op: the bit layout, ``quantize``, ``pack`` and ``unpack``.

A scheme is a format, and how activations enter the product:

    int8 int4 int4_asym     activations are rounded to int8 on the fly, in the groups of the
                            weight, so that an outlier costs its group alone
    fp8 fp8_block           likewise to e4m3
    nf4                     activations stay in floating point
    _a16 after any name     likewise

A weight W of shape (N, K), as in torch.nn.Linear, is stored as ``scale * level(code)``:

    format      code                  level               scale
    int8        byte, 1..255          code - 128          fp32, of a row
    int4        nibble, 0..15         code - 8            bf16, of a group, of either sign
    int4_asym   nibble, 0..15         code - zero         bf16, of a group
    nf4         nibble, 0..15         NF4_LEVELS[code]    bf16, of a group
    fp8         byte, e4m3 (finite)   its value           fp32, of a row
    fp8_block   byte, e4m3 (finite)   its value           fp32, of 128 x 128 weights

A group is ``group_size`` consecutive weights of a row; the last group of a row may be short, and
so may be the blocks of the last rows.
``llmos_fast.rounding`` says how scales and codes are chosen.

Integer and nf4 weights lie in panels of 16 rows, the last one filled up with zeros, so that one
vector register holds the same k of 16 rows and a product reads memory from front to back:

    packed       uint8 (N / 16, words, 16, 4)   a word is four bytes of one row:
                 8 bits: byte j of word w is the code of k = 4 w + j
                 4 bits: byte j of word w holds k = 8 w + j low, k = 8 w + 4 + j high
    scales       (N / 16, groups, 16)
    zero_points  uint8 (N / 16, groups, 16), 0..15; int4_asym only

fp8 is read by GPUs, in rows: ``packed`` is uint8 (N, K), ``scales`` (N, 1), or for fp8_block
(N / 128, K / 128), both rounded up. A scale for a whole weight is the same one in every row. These
layouts are the same on every device and in every file.

Source: NF4 from QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmos_fast.formats import FORMATS as FORMATS
from llmos_fast.formats import FOUR_BIT as FOUR_BIT
from llmos_fast.formats import FP8 as FP8
from llmos_fast.formats import NF4_LEVELS as NF4_LEVELS
from llmos_fast.formats import levels_of_codes, scale_dtype
from llmos_fast.groups import group_columns, group_rows, in_groups, in_rows, scales_of_rows
from llmos_fast.rounding import METHODS, choose_scales, encode

SCHEMES = tuple(f"{name}{suffix}" for name in FORMATS for suffix in ("", "_a16"))
GROUP_SIZES = (32, 64, 128)
PANEL = 16
# Where the code of weight i begins in a word of 4-bit weights.
_NIBBLE_SHIFTS = (0, 8, 16, 24, 4, 12, 20, 28)


def format_of(scheme: str) -> str:
    """The weight format of a scheme: its name without "_a16"."""
    if scheme not in SCHEMES:
        raise ValueError(f"quantize: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    return scheme.removesuffix("_a16")


def rounds_activations(scheme: str) -> bool:
    """True where the scheme multiplies activations of 8 bits (W8A8, W4A8)."""
    return scheme in FORMATS and scheme != "nf4"


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized (N, K) matrix; the module docstring says what the bits mean.

    ``group_size`` is K for the formats that scale whole rows, 128 for fp8_block.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    scheme: str
    group_size: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Raise ValueError for parts that do not fit together: kernels get bare addresses."""
        name = format_of(self.scheme)
        only = group_columns(name, self.group_size, self.shape[1])
        if self.group_size not in (GROUP_SIZES if name in FOUR_BIT else (only,)):
            whole = f"{only}{' (whole rows)' * (name != 'fp8_block')}"
            rule = f"be {'32, 64 or 128' if name in FOUR_BIT else whole} for {name}"
            raise _error("group_size", rule, self.group_size)
        if (self.zero_points is None) != (name != "int4_asym"):
            got = "none" if self.zero_points is None else "a tensor"
            raise _error("zero_points", "be given for int4_asym, and only for it", got)
        expected = shapes(self.scheme, self.shape, self.group_size)
        dtypes = {"scales": scale_dtype(name)}
        for part, tensor in self.tensors().items():
            shape, dtype = expected[part], dtypes.get(part, torch.uint8)
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != self.device:
                got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                raise _error(part, f"be {dtype} {shape} on {self.device}", got)
            if not tensor.is_contiguous():
                raise _error(part, "be contiguous", f"strides {tensor.stride()}")

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
        zeros = None if self.zero_points is None else self.zero_points.to(device)
        packed, scales = self.packed.to(device), self.scales.to(device)
        return replace(self, packed=packed, scales=scales, zero_points=zeros)

    def check_values(self) -> None:
        """Raise ValueError for scales that are not finite: for weights that came from a file."""
        bad = int((~torch.isfinite(self.scales)).sum())
        if bad:
            raise ValueError(f"QuantizedWeight: scales must be finite, got {bad} of inf or NaN")

    def codes(self) -> Tensor:
        """uint8 (N, K): the stored code of every weight."""
        name = format_of(self.scheme)
        return self.packed if name in FP8 else unpack(self.packed, self.shape, _bits(name))

    def row_scales(self) -> Tensor:
        """fp32 (N, groups)."""
        name, n = format_of(self.scheme), self.shape[0]
        if name in FP8:
            return scales_of_rows(self.scales, name, n)
        return _from_panels(self.scales, n).float()

    def row_zero_points(self) -> Tensor | None:
        """uint8 (N, groups), or None where the format has none."""
        return None if self.zero_points is None else _from_panels(self.zero_points, self.shape[0])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, K) in ``dtype``: scale * level in fp32 (fp64 for fp64), rounded once."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return (levels(self, compute) * _spread(self.row_scales().to(compute), self)).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(ids, K): ``dequantize(dtype)[ids]`` for int64 ids, of which no other row is read."""
        name, k = format_of(self.scheme), self.shape[1]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        if name in FP8:
            found = levels_of_codes(name, self.packed[ids], None, compute)
            return found.mul_(_spread(self.scales[ids // group_rows(name)], self)).to(dtype)
        where = ids // PANEL, slice(None), ids % PANEL
        words = self.packed.view(torch.int32).squeeze(-1)[where]
        scales = self.scales[where].to(compute)
        if name not in FOUR_BIT:
            codes = words.view(torch.uint8)[:, :k]
            return levels_of_codes(name, codes, None, compute).mul_(scales).to(dtype)
        shifts = torch.tensor(_NIBBLE_SHIFTS, dtype=torch.int32, device=ids.device)
        codes = (words.unsqueeze(-1) >> shifts).bitwise_and_(15).flatten(1)
        groups = scales.shape[1]
        filled = groups * self.group_size - codes.shape[1]
        grouped = torch.nn.functional.pad(codes, (0, filled)).unflatten(1, (groups, -1))
        zeros = None if self.zero_points is None else self.zero_points[where].to(compute)[..., None]
        found = levels_of_codes(name, grouped, zeros, compute)
        return found.mul_(scales[..., None]).flatten(1)[:, :k].to(dtype)


def _error(part: str, rule: str, got: object) -> ValueError:
    return ValueError(f"QuantizedWeight: {part} must {rule}, got {got}")


def empty(
    shape: tuple[int, int], scheme: str, group_size: int, device: torch.device | str | None = None
) -> QuantizedWeight:
    """A weight whose codes and scales are all 0, to be filled from a state_dict."""
    name = format_of(scheme)
    _check_group_size(group_size)
    n, k = shape
    group = group_columns(name, group_size, k)
    part_shapes = shapes(scheme, shape, group)
    zero_points = None
    if name == "int4_asym":
        zero_points = torch.zeros(part_shapes["zero_points"], dtype=torch.uint8, device=device)
    packed = torch.zeros(part_shapes["packed"], dtype=torch.uint8, device=device)
    scales = torch.zeros(part_shapes["scales"], dtype=scale_dtype(name), device=device)
    return QuantizedWeight(packed, scales, zero_points, scheme, group, (n, k))


def shapes(scheme: str, shape: tuple[int, int], group_size: int) -> dict[str, tuple[int, ...]]:
    """Of the stored tensors of an (N, K) weight."""
    name = format_of(scheme)
    n, k = shape
    groups = -(-k // group_size)
    if name in FP8:
        return {"packed": (n, k), "scales": (-(-n // group_rows(name)), groups)}
    panels = -(-n // PANEL)
    per_group = (panels, groups, PANEL)
    words = -(-k // (32 // _bits(name)))
    return {"packed": (panels, words, PANEL, 4), "scales": per_group, "zero_points": per_group}


def levels(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """(N, K) in ``dtype``: what the codes stand for, before the scales."""
    name = format_of(weight.scheme)
    zero_points = weight.row_zero_points()
    zeros = None if zero_points is None else _spread(zero_points.to(dtype), weight)
    return levels_of_codes(name, weight.codes(), zeros, dtype)


def _bits(name: str) -> int:
    return 4 if name in FOUR_BIT else 8


def _spread(per_group: Tensor, weight: QuantizedWeight) -> Tensor:
    """(N, groups) -> broadcastable to (N, K): every group's value at each of its weights."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(weight.group_size, dim=1)[:, : weight.shape[1]]


def _to_panels(per_group: Tensor) -> Tensor:
    """(N, groups) -> (N / 16, groups, 16), new rows 0."""
    filled = torch.nn.functional.pad(per_group, (0, 0, 0, -per_group.shape[0] % PANEL))
    panels: Tensor = filled.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return panels


def _from_panels(panels: Tensor, n: int) -> Tensor:
    """The inverse."""
    return panels.transpose(1, 2).flatten(0, 1)[:n]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (N, K) of 4 or 8 bits -> uint8 (N / 16, words, 16, 4)."""
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise ValueError(
            f"pack: codes must be 2-D uint8, got {codes.ndim}-D {str(codes.dtype)[6:]}"
        )
    if bits == 4 and codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"pack: codes must be at most 15, got {int(codes.max())}")
    n, k = codes.shape
    filled = torch.nn.functional.pad(codes, (0, -k % (32 // bits), 0, -n % PANEL))
    words: Tensor = (
        filled.unflatten(0, (-1, PANEL)).unflatten(2, (-1, 8 // bits, 4)).transpose(1, 2)
    )
    if bits == 8:
        return words[..., 0, :].contiguous()
    return (words[..., 0, :] | (words[..., 1, :] << 4)).contiguous()


def unpack(packed: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """uint8 (N / 16, words, 16, 4) -> codes uint8 (N, K) = ``shape``: the inverse of ``pack``."""
    n, k = shape
    expected = (-(-n // PANEL), -(-k // (32 // bits)), PANEL, 4)
    if packed.dtype != torch.uint8 or packed.shape != expected:
        raise ValueError(
            f"unpack: packed must be uint8 {expected} for a weight of {shape}, "
            f"got {str(packed.dtype)[6:]} {tuple(packed.shape)}"
        )
    halves = packed.unsqueeze(3)
    if bits == 4:
        halves = torch.cat((halves & 15, halves >> 4), dim=3)
    return halves.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k].contiguous()


def from_codes(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    scheme: str,
    group_size: int,
) -> QuantizedWeight:
    """Store a weight that was quantized elsewhere.

    codes: uint8 (N, K), as the module docstring defines them for the format
    scales: (N, groups), or (N / 128, groups) for fp8_block; finite; rounded to the stored dtype
    zero_points: (N, groups), integers 0..15, for int4_asym, else None
    """
    name = format_of(scheme)
    n, k = codes.shape
    group = group_columns(name, group_size, k)
    scales = scales.to(scale_dtype(name)).contiguous()
    if name not in FP8:
        codes, scales = pack(codes, _bits(name)), _to_panels(scales)
        zero_points = None if zero_points is None else _to_panels(zero_points.to(torch.uint8))
    return QuantizedWeight(codes.contiguous(), scales, zero_points, scheme, group, (n, k))


def pair_multiple(scheme: str) -> int:
    """What the rows of two weights must be a multiple of to be interleaved."""
    name = format_of(scheme)
    return group_rows(name) if name in FP8 else PANEL


def rows_in_turn(scheme: str, n: int) -> int:
    """Rows of ``gate`` before as many of ``up``, where they have ``n`` each."""
    return n if format_of(scheme) in FP8 else PANEL


def can_interleave(gate: QuantizedWeight, up: QuantizedWeight) -> bool:
    """Whether ``interleave`` takes the two."""
    same = (up.shape, up.scheme, up.group_size) == (gate.shape, gate.scheme, gate.group_size)
    return same and gate.shape[0] % pair_multiple(gate.scheme) == 0


def interleave(gate: QuantizedWeight, up: QuantizedWeight) -> QuantizedWeight:
    """One weight for a gated product: panels of ``gate`` and ``up`` in turn.

    fp8 lies in rows: all of ``gate``, then all of ``up``. Both (N, K) of one scheme and group size;
    N is a multiple of 16, of 128 for fp8_block, any for fp8. The result is (2 N, K).
    """
    if not can_interleave(gate, up):
        raise ValueError(
            "interleave: gate and up must be alike, with a multiple of "
            f"{pair_multiple(gate.scheme)} rows, got {gate.scheme} {gate.shape} in groups of "
            f"{gate.group_size} and {up.scheme} {up.shape} in groups of {up.group_size}"
        )
    n, k = gate.shape
    turns = n // rows_in_turn(gate.scheme, n)
    pairs = zip(gate.tensors().values(), up.tensors().values(), strict=True)
    return _with_parts(gate, (_in_turn(*pair, turns) for pair in pairs), (2 * n, k))


def _in_turn(first: Tensor, second: Tensor, turns: int) -> Tensor:
    """Rows of both in turn; not torch.stack, which imports torch's compiler for "meta" tensors."""
    rows = first.new_empty((2 * first.shape[0], *first.shape[1:]))
    both = rows.unflatten(0, (turns, 2, -1))
    both[:, 0], both[:, 1] = (part.unflatten(0, (turns, -1)) for part in (first, second))
    return rows


def separate(pair: QuantizedWeight) -> tuple[QuantizedWeight, QuantizedWeight]:
    """(gate, up) of what ``interleave`` made."""
    n, k = pair.shape[0] // 2, pair.shape[1]
    turns = n // rows_in_turn(pair.scheme, n)
    parts = [part.unflatten(0, (turns, 2, -1)).unbind(1) for part in pair.tensors().values()]
    gate, up = (
        [half.flatten(0, 1).contiguous() for half in one] for one in zip(*parts, strict=True)
    )
    return _with_parts(pair, gate, (n, k)), _with_parts(pair, up, (n, k))


def _with_parts(
    like: QuantizedWeight, parts: Iterable[Tensor], shape: tuple[int, int]
) -> QuantizedWeight:
    packed, scales, *zeros = parts
    zero_points = zeros[0] if zeros else None
    return replace(like, packed=packed, scales=scales, zero_points=zero_points, shape=shape)


def quantize(
    weight: Tensor, scheme: str = "int8", group_size: int = 128, method: str = "mse"
) -> QuantizedWeight:
    """Quantize a floating-point (N, K) weight by rounding to the nearest level.

    ``group_size`` (32, 64 or 128) counts for the 4-bit formats; int8 and fp8 scale whole rows,
    fp8_block has 128.
    ``method``, "mse" or "absmax", chooses the scales, as ``llmos_fast.rounding`` says. A row or
    group of zeros gets scale 0. Raises ValueError for weights that are not 2-D, not floating point,
    empty, or not finite, and for an unknown scheme, group size or method.
    """
    name = format_of(scheme)
    _check(weight, group_size, method)
    grouped = in_groups(weight, name, group_size)
    scales, zeros = choose_scales(grouped, name, method)
    n, k = weight.shape
    codes = in_rows(encode(grouped, name, scales, zeros), name)[:n, :k]
    return from_codes(codes, scales, zeros, scheme, group_size)


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"quantize: group_size must be 32, 64 or 128, got {group_size!r}")


def _check(weight: Tensor, group_size: int, method: str) -> None:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"quantize: weight must be a non-empty (N, K), got shape {tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        raise ValueError(f"quantize: weight must be floating point, got {weight.dtype}")
    _check_group_size(group_size)
    if method not in METHODS:
        raise ValueError(f"quantize: method must be one of {', '.join(METHODS)}, got {method!r}")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(f"quantize: weight must be finite, got {bad} values of inf or NaN")
