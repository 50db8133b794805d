"""How scales and codes are chosen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_fast.formats import FORMATS, FOUR_BIT, levels_of_codes, round_scales
from llmos_fast.quantize import quantize
from llmos_fast.rounding import choose_scales, encode

FP32 = torch.float32

DISTRIBUTIONS = {
    "normal": torch.randn,
    "uniform": torch.rand,
    "heavy": lambda *size: torch.randn(*size) ** 5,
    "negative": lambda *size: -torch.rand(*size) - 1,
    "constant": lambda *size: torch.ones(*size) * torch.randn(1),
}


def group_errors(weight, quantized):
    """Squared error of every group, in fp64."""
    error = (quantized.dequantize(torch.float64) - weight.double()).square()
    padding = -weight.shape[1] % quantized.group_size
    return torch.nn.functional.pad(error, (0, padding)).unflatten(1, (-1, quantized.group_size))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    distribution=st.sampled_from(sorted(DISTRIBUTIONS)),
    n=st.integers(1, 20),
    k=st.integers(1, 150),
    group=st.sampled_from((32, 64, 128)),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**31),
)
def test_mse_is_never_worse_than_absmax(name, distribution, n, k, group, exponent, seed):
    torch.manual_seed(seed)
    weight = DISTRIBUTIONS[distribution](n, k) * 10.0**exponent
    absmax = group_errors(weight, quantize(weight, name, group, "absmax")).sum(-1)
    searched = group_errors(weight, quantize(weight, name, group, "mse")).sum(-1)
    rounding = weight.double().square().sum(-1, keepdim=True) * 1e-12  # of the search in fp32
    if name == "fp8_block":  # one has all rows
        absmax, searched, rounding = (errors.sum(0) for errors in (absmax, searched, rounding))
    assert bool((searched <= absmax * (1 + 1e-5) + rounding).all())


@pytest.mark.parametrize(
    ("name", "group", "bound"),
    [
        ("int4", 32, 0.086),  # llama.cpp's Q4_0
        ("int4", 64, 0.092),
        ("int4_asym", 32, 0.079),
        ("nf4", 64, 0.087),
        ("int8", 128, 0.0091),
    ],
)
def test_error_on_gaussian_weights(name, group, bound):
    weight = torch.randn(256, 4096)
    error = (quantize(weight, name, group).dequantize() - weight).norm() / weight.norm()
    assert error < bound


def test_blocks_change_nothing(monkeypatch):
    weight = torch.randn(33, 70)
    whole = [quantize(weight, name, 32) for name in FORMATS]
    monkeypatch.setattr("llmos_fast.rounding._BLOCK", 200)
    for name, expected in zip(FORMATS, whole, strict=True):
        for part, other in quantize(weight, name, 32).tensors().items():
            assert torch.equal(other, expected.tensors()[part])


@pytest.mark.parametrize("name", FOUR_BIT)
def test_importance_decides_what_is_rounded_well(name):
    weight, importance = torch.randn(64, 2, 32), torch.rand(2, 32) ** 4

    def weighted_error(importance_of_search):
        scales, zeros = choose_scales(weight, name, "mse", importance_of_search)
        codes = encode(weight, name, scales, zeros)
        levels = levels_of_codes(name, codes, None if zeros is None else zeros[..., None], FP32)
        return ((levels * scales[..., None] - weight).square() * importance).sum(-1)

    assert (weighted_error(importance) / weighted_error(None)).mean() < 0.88


def test_the_least_level_of_int4_reaches_either_sign():
    """-8 stands for the largest weight: then 15 levels lie on one side and not 14."""
    weight = torch.cat((torch.arange(-7.0, 9.0), torch.zeros(16)))[None]
    for sign in (1, -1):
        exact = quantize(sign * weight, "int4", 32)
        assert torch.equal(exact.dequantize(), sign * weight)
        assert exact.row_scales().item() == -sign


@pytest.mark.parametrize("method", ["mse", "absmax"])
@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_tiny_and_huge_weights(name, method):
    weight = torch.zeros(4, 64)
    weight[1], weight[2], weight[3] = 1e-43, 3e38, 3e38 * torch.linspace(-1, 1, 64)
    quantized = quantize(weight, name, 32, method)
    result = quantized.dequantize(torch.float64)
    assert bool(torch.isfinite(quantized.scales).all())
    assert bool(torch.isfinite(result).all())
    assert not result[0].any()
    assert bool(((result[2] / 3e38 - 1).abs() < 0.08).all())


@pytest.mark.parametrize("name", FOUR_BIT)
def test_scales_are_compared_as_they_are_stored(name):
    scales, _ = choose_scales(torch.randn(8, 4, 32), name, "mse")
    assert torch.equal(scales, scales.bfloat16().float())


def test_stored_scales_are_rounded_away_from_zero():
    given = torch.tensor([1.0, 1.001, -1.001, 0.0, 3.4e38, -3.4e38])
    rounded = round_scales(given, "int4")
    largest = torch.finfo(torch.bfloat16).max
    assert rounded.tolist() == [1.0, 1.0078125, -1.0078125, 0.0, largest, -largest]
    assert torch.equal(round_scales(given, "int8"), given)
