"""The weight formats: layout, round trips, rounding, refusals."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast.models.config import ModelConfig
from llmos_fast.models.feed_forward import FeedForward
from llmos_fast.nn import dequantize_, quantize_
from llmos_fast.quantize import (
    FORMATS,
    FOUR_BIT,
    FP8,
    NF4_LEVELS,
    SCHEMES,
    QuantizedWeight,
    can_interleave,
    empty,
    from_codes,
    interleave,
    pack,
    quantize,
    separate,
    unpack,
)
from llmos_fast.rounding import METHODS

SIZES = [(1, 1), (7, 63), (17, 253), (5, 256)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 8, 9, 63, 64])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48])
def test_pack_and_unpack_are_inverse(rows, columns, bits):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (-(-rows // 16), -(-columns * bits // 32), 16, 4)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, (rows, columns), bits), codes)
    assert torch.equal(pack(unpack(packed, (rows, columns), bits), bits), packed)


def test_layout_is_panels_of_16_rows():
    """Byte j of a row's word w: k = 4 w + j, or the nibbles of k = 8 w + j and 8 w + 4 + j."""
    codes = torch.randint(0, 16, (20, 18), dtype=torch.uint8)
    bytes_, nibbles = pack(codes, 8), pack(codes, 4)
    for row in range(32):
        for k in range(24):
            expected = codes[row, k].item() if row < 20 and k < 18 else 0
            if k < 20:
                assert bytes_[row // 16, k // 4, row % 16, k % 4] == expected
            byte = nibbles[row // 16, k // 8, row % 16, k % 4].item()
            assert (byte >> 4 if k % 8 >= 4 else byte & 15) == expected


def test_scales_and_zero_points_lie_in_panels():
    weight = quantize(torch.randn(20, 70), "int4_asym", 32)
    assert weight.scales.shape == weight.zero_points.shape == (2, 3, 16)
    assert weight.scales.dtype == torch.bfloat16
    for row in range(20):
        for group in range(3):
            position = (row // 16, group, row % 16)
            assert weight.row_scales()[row, group] == weight.scales[position]
            assert weight.row_zero_points()[row, group] == weight.zero_points[position]
    assert not weight.scales[1, :, 4:].any()
    assert not weight.zero_points[1, :, 4:].any()


def test_known_codes():
    def codes(values, name):
        return quantize(torch.tensor([values]), name, method="absmax").codes().tolist()

    assert codes([-7.5, -1.0, 0.0, 0.4, 7.5], "int4") == [[0, 7, 8, 8, 15]]
    assert codes([-1.0, 0.0, 14.0], "int4_asym") == [[0, 1, 15]]
    assert codes([-127.0, 0.5, 1.5, 3.0], "int8") == [[1, 128, 130, 131]]
    assert codes([448.0, -1.0, 2.0**-9], "fp8") == [[0x7E, 0xB8, 0x01]]
    assert codes(list(NF4_LEVELS), "nf4") == [list(range(16))]
    asymmetric = quantize(torch.tensor([[-1.0, 0.0, 14.0]]), "int4_asym", method="absmax")
    assert asymmetric.row_zero_points().tolist() == [[1]]


@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_error_is_at_most_half_a_step(name, n, k):
    weight = torch.randn(n, k)
    quantized = quantize(weight, name, 64, "absmax")
    error = (quantized.dequantize(torch.float64) - weight.double()).abs()
    step = quantized.row_scales().double()
    step = step.repeat_interleave(quantized.group_size, dim=1)[:, :k]
    if name in FP8:  # 3 bits of mantissa, and subnormals below 2^-6
        half_step = torch.maximum(weight.double().abs() / 16, step / 1024)
    else:
        widest = {"nf4": 1 - 0.6961928009986877, "int4_asym": 2.0}.get(name, 1.0)
        half_step = widest / 2 * step
    assert bool((error <= half_step * (1 + 1e-5)).all())


def test_from_codes_keeps_what_it_is_given():
    codes = torch.randint(0, 16, (9, 70), dtype=torch.uint8)
    scales = torch.randn(9, 3).bfloat16().float()
    zeros = torch.randint(0, 16, (9, 3))
    weight = from_codes(codes, scales, zeros, "int4_asym", 32)
    assert torch.equal(weight.codes(), codes)
    assert torch.equal(weight.row_scales(), scales)
    assert torch.equal(weight.row_zero_points().long(), zeros)
    group = torch.arange(70) // 32
    expected = (codes - zeros[:, group]) * scales[:, group]
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme):
    weight = torch.randn(4, 100)
    weight[1] = 0
    weight[2, 32:64] = 0
    result = quantize(weight, scheme, group_size=32).dequantize()
    assert not result[1].any()
    assert not result[2, 32:64].any()


@pytest.mark.parametrize("name", FORMATS)
def test_tiny_weights_give_finite_results(name):
    result = quantize(torch.full((2, 40), 1e-43), name, group_size=32)
    assert bool(torch.isfinite(result.scales).all())
    assert bool(torch.isfinite(result.dequantize()).all())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    n=st.integers(1, 20),
    k=st.integers(1, 150),
    group=st.sampled_from((32, 64, 128)),
)
def test_second_rounding_changes_nothing_much(name, n, k, group):
    first = quantize(torch.randn(n, k), name, group)
    assert first.packed.shape == empty((n, k), name, group).packed.shape
    assert first.scales.shape == empty((n, k), name, group).scales.shape
    again = quantize(first.dequantize(), name, group)
    span = first.row_scales().abs().max().item() * (32.0 if name in FP8 else 1.0)
    assert (first.dequantize() - again.dequantize()).abs().max().item() <= span


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.startswith("fp8_block")])
def test_rows_are_independent(scheme, method):
    weight = torch.randn(21, 70)
    whole = quantize(weight, scheme, 32, method)
    part = quantize(weight[14:18], scheme, 32, method)
    assert torch.equal(whole.codes()[14:18], part.codes())
    assert torch.equal(whole.row_scales()[14:18], part.row_scales())
    if part.zero_points is not None:
        assert torch.equal(whole.row_zero_points()[14:18], part.row_zero_points())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 128), (130, 257), (300, 128)])
def test_a_block_has_a_scale(n, k, method):
    """Each block is rounded as if it were the whole weight, and as one long row."""
    weight = torch.randn(n, k) * 10.0 ** torch.randint(-3, 3, (n, k))
    whole = quantize(weight, "fp8_block", method=method)
    assert whole.scales.shape == (-(-n // 128), -(-k // 128))
    assert (whole.scales.dtype, whole.group_size) == (torch.float32, 128)
    assert whole.row_scales().shape == (n, whole.scales.shape[1])
    assert torch.equal(whole.rows(torch.arange(n)), whole.dequantize())
    for i, rows in enumerate(weight.split(128)):
        for j, block in enumerate(rows.split(128, dim=1)):
            alone = quantize(block, "fp8_block", method=method)
            assert torch.equal(alone.scales, whole.scales[i, j].view(1, 1))
            part = whole.packed[128 * i :, 128 * j :][: block.shape[0], : block.shape[1]]
            assert torch.equal(alone.packed, part)
            flat = quantize(block.reshape(1, -1), "fp8", method=method)
            assert torch.equal(flat.packed.view_as(block), part) or method == "mse"


def test_one_scale_for_a_weight_is_that_of_every_row():
    weight = torch.randn(20, 30)
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)
    stored = from_codes(codes, scale.expand(20, 1), None, "fp8", 128)
    assert torch.equal(stored.dequantize(), codes.view(torch.float8_e4m3fn).float() * scale)


def test_copies_and_moves_keep_the_bits():
    weight = quantize(torch.randn(4, 65), "int4_asym")
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to("cpu")):
        assert isinstance(other, QuantizedWeight)
        assert (other.scheme, other.group_size, other.shape) == ("int4_asym", 128, (4, 65))
        assert all(torch.equal(a, weight.tensors()[n]) for n, a in other.tensors().items())
    assert weight.nbytes == 9 * 16 * 4 + 2 * 16 + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_every_dtype(name, dtype):
    weight = torch.randn(3, 40).to(dtype)
    assert torch.equal(quantize(weight, name).packed, quantize(weight.float(), name).packed)
    assert quantize(weight, name).dequantize(dtype).dtype == dtype


@pytest.mark.parametrize(
    ("weight", "scheme", "group", "message"),
    [
        (torch.zeros(3), "int8", 128, r"weight must be a non-empty \(N, K\), got shape \(3,\)"),
        (torch.zeros(0, 3), "int8", 128, r"non-empty"),
        (torch.zeros(3, 3, dtype=torch.int32), "int8", 128, "floating point, got torch.int32"),
        (torch.full((2, 2), float("nan")), "int4", 128, "finite, got 4 values"),
        (torch.full((2, 2), float("inf")), "fp8", 128, "finite, got 4 values"),
        (torch.ones(2, 2), "int3", 128, "scheme must be one of .*, got 'int3'"),
        (torch.ones(2, 2), "int4", 48, "group_size must be 32, 64 or 128, got 48"),
    ],
    ids=["1-D", "empty", "integer", "nan", "inf", "scheme", "group"],
)
def test_bad_input_is_refused(weight, scheme, group, message):
    with pytest.raises(ValueError, match=f"quantize: .*{message}"):
        quantize(weight, scheme, group)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="quantize: method must be one of mse, absmax, got 'best'"):
        quantize(torch.ones(2, 2), "int4", 32, "best")


def test_bad_codes_are_refused():
    with pytest.raises(ValueError, match="pack: codes must be at most 15, got 16"):
        pack(torch.full((1, 2), 16, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="pack: codes must be 2-D uint8, got 1-D int64"):
        pack(torch.zeros(2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"unpack: packed must be uint8 \(2, 1, 16, 4\) for"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), (17, 4), 4)


def test_four_bit_formats_take_half_a_byte():
    weight = torch.randn(32, 256)
    assert all(quantize(weight, name).packed.nbytes == 32 * 128 for name in FOUR_BIT)


IN_ROWS = [s for s in SCHEMES if s.startswith("fp8")]
IN_PANELS = [s for s in SCHEMES if s not in IN_ROWS]


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        *itertools.product(IN_PANELS, [(16, 1), (32, 40), (48, 253)]),
        *itertools.product(IN_ROWS, [(128, 1), (256, 130)]),
        ("fp8", (17, 40)),
    ],
)
def test_separate_undoes_interleave(scheme, shape):
    gate, up = (quantize(torch.randn(shape), scheme, 32) for _ in range(2))
    pair = interleave(gate, up)
    assert pair.shape == (2 * shape[0], shape[1])
    rows = pair.dequantize().unflatten(0, (-1, 2, shape[0] if scheme in IN_ROWS else 16))
    assert torch.equal(rows[:, 0].flatten(0, 1), gate.dequantize())
    assert torch.equal(rows[:, 1].flatten(0, 1), up.dequantize())
    for one, again in zip((gate, up), separate(pair), strict=True):
        assert (again.shape, again.scheme, again.group_size) == (shape, scheme, one.group_size)
        assert one.tensors().keys() == again.tensors().keys()
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, again.tensors()[name])


@pytest.mark.parametrize(
    ("gate", "up"),
    [
        (((24, 64), "int4", 32), ((24, 64), "int4", 32)),
        (((32, 64), "int4", 32), ((16, 64), "int4", 32)),
        (((32, 64), "int4", 32), ((32, 32), "int4", 32)),
        (((32, 64), "int4", 32), ((32, 64), "int4", 64)),
        (((32, 64), "int4", 32), ((32, 64), "nf4", 32)),
        (((32, 64), "fp8", 32), ((32, 64), "fp8_a16", 32)),
        (((192, 64), "fp8_block", 32), ((192, 64), "fp8_block", 32)),
    ],
)
def test_interleave_refuses_what_does_not_fit(gate, up):
    gate, up = (quantize(torch.randn(shape), *options) for shape, *options in (gate, up))
    assert not can_interleave(gate, up)
    with pytest.raises(ValueError, match="interleave: gate and up must"):
        interleave(gate, up)


@pytest.mark.parametrize("inner", [40, 48])
@pytest.mark.parametrize("scheme", ["int8", "int4_asym", "nf4", "fp8"])
def test_dequantize_restores_gate_and_up(scheme, inner):
    sizes = {"vocabulary": 9, "width": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16}
    config = ModelConfig(
        **sizes, inner=inner, max_length=9, norm="rms", norm_eps=1e-6, activation="silu", gated=True
    )
    model = torch.nn.Sequential(FeedForward(config))
    rounded = {
        f"{name}.weight": quantize(linear.weight, scheme, 32).dequantize()
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear)
    }
    names = {name for name, _ in model.named_modules()}
    quantize_(model, scheme, 32)
    assert hasattr(model[0], "gate_up") == (inner % 16 == 0 or scheme == "fp8")
    dequantize_(model)
    assert {name for name, _ in model.named_modules()} == names
    state = model.state_dict()
    assert state.keys() == rounded.keys()
    assert all(torch.equal(state[name], weight) for name, weight in rounded.items())
