"""The weight formats: layout, round trips, rounding, refusals."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast.quantize import (
    FORMATS,
    FOUR_BIT,
    NF4_LEVELS,
    SCHEMES,
    QuantizedWeight,
    empty,
    pack,
    quantize,
    unpack,
)

SIZES = [(1, 1), (7, 63), (63, 253), (5, 256)]


@pytest.mark.parametrize("columns", [1, 2, 7, 63, 64])
def test_pack_and_unpack_are_inverse(columns):
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (5, (columns + 1) // 2)
    assert torch.equal(unpack(packed, columns), codes)
    assert torch.equal(pack(unpack(packed, columns)), packed)


def test_layout_is_low_nibble_first_and_pads_with_zero():
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]


def test_known_codes():
    weight = torch.tensor([[-7.5, -1.0, 0.0, 0.4, 7.5]])
    assert unpack(quantize(weight, "int4").packed, 5).tolist() == [[0, 7, 8, 8, 15]]
    asymmetric = quantize(torch.tensor([[-1.0, 0.0, 14.0]]), "int4_asym")
    assert unpack(asymmetric.packed, 3).tolist() == [[0, 1, 15]]
    assert asymmetric.zero_points.tolist() == [[1]]
    assert quantize(torch.tensor([[-127.0, 0.5, 1.5, 3.0]]), "int8").packed.tolist() == [
        [-127, 0, 2, 3]
    ]
    assert quantize(torch.tensor([[448.0, -1.0, 2.0**-9]]), "fp8").packed.tolist() == [
        [0x7E, 0xB8, 0x01]
    ]
    nf4 = quantize(torch.tensor([NF4_LEVELS]), "nf4")
    assert unpack(nf4.packed, 16).tolist() == [list(range(16))]


@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_error_is_at_most_half_a_step(name, n, k):
    weight = torch.randn(n, k)
    quantized = quantize(weight, name, group_size=64)
    error = (quantized.dequantize(torch.float64) - weight.double()).abs()
    group = quantized.group_size
    step = quantized.scales.double().repeat_interleave(group, dim=1)[:, :k]
    if name == "fp8":  # 3 bits of mantissa, and subnormals below 2^-6
        half_step = torch.maximum(weight.double().abs() / 16, step / 1024)
    else:
        widest = {"nf4": 1 - 0.6961928009986877, "int4_asym": 2.0}.get(name, 1.0)
        half_step = widest / 2 * step
    assert bool((error <= half_step * (1 + 1e-5)).all())


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
    span = first.scales.max().item() * {"fp8": 32.0}.get(name, 1.0)
    assert (first.dequantize() - again.dequantize()).abs().max().item() <= span


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_independent(scheme):
    weight = torch.randn(9, 70)
    whole = quantize(weight, scheme, 32)
    part = quantize(weight[2:5], scheme, 32)
    for ours, theirs in zip(
        whole.rows(2, 5).tensors().values(), part.tensors().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_copies_and_moves_keep_the_bits():
    weight = quantize(torch.randn(4, 65), "int4_asym")
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to("cpu")):
        assert isinstance(other, QuantizedWeight)
        assert (other.scheme, other.group_size, other.shape) == ("int4_asym", 128, (4, 65))
        assert all(torch.equal(a, weight.tensors()[n]) for n, a in other.tensors().items())
    assert weight.nbytes == 4 * 33 + 4 * 4 + 4


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


def test_bad_codes_are_refused():
    with pytest.raises(ValueError, match="pack: codes must be at most 15, got 16"):
        pack(torch.full((1, 2), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pack: codes must be 2-D uint8, got 1-D int64"):
        pack(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"unpack: packed must be uint8 of shape \(N, 2\)"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 4)


def test_four_bit_formats_take_half_a_byte():
    assert all(quantize(torch.randn(2, 256), name).packed.shape == (2, 128) for name in FOUR_BIT)
