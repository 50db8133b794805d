"""GPTQ on one weight, and quantize_ with calibration data on models."""

import pytest
import torch
from torch import nn

import llmos_fast
from llmos_fast.formats import FORMATS
from llmos_fast.nn import QuantLinear, gptq, quantize_
from llmos_fast.quantize import empty, from_codes, quantize


def correlated(rows, k):
    """Inputs whose columns depend on each other and differ in size."""
    mixed = torch.randn(rows, k) @ (torch.randn(k, k) / k**0.5 + 0.3 * torch.eye(k))
    return mixed * torch.rand(k).mul(3).exp()


def output_error(x, weight, quantized):
    return ((x @ (quantized.dequantize() - weight).T).norm() / (x @ weight.T).norm()).item()


@pytest.mark.parametrize("k", [64, 128, 200, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_better_than_rounding_to_nearest(name, k):
    """Widths below, at and beyond a block of columns, with short groups and whole ones."""
    x, weight = correlated(1024, k), torch.randn(24, k)
    ours = output_error(x, weight, gptq.gptq(weight, x.T @ x, name, 64))
    assert ours < 0.7 * output_error(x, weight, quantize(weight, name, 64))


def test_independent_inputs_of_one_size_round_to_nearest():
    weight = torch.randn(8, 96)
    ours = gptq.gptq(weight, torch.eye(96), "int4", 32)
    assert torch.equal(ours.codes(), quantize(weight, "int4", 32).codes())


def test_blocks_change_nothing(monkeypatch):
    x, weight = correlated(512, 150), torch.randn(8, 150)
    whole = gptq.gptq(weight, x.T @ x, "int4", 32)
    monkeypatch.setattr(gptq, "_BLOCK", 7)
    parts = gptq.gptq(weight, x.T @ x, "int4", 32)
    assert (whole.codes() != parts.codes()).float().mean() < 0.01


def test_all_rows_of_a_block_count():
    x, weight = correlated(1024, 200), torch.randn(140, 200)
    weight[0] *= 1e-3
    scales = gptq.gptq(weight, x.T @ x, "fp8_block", 128).scales
    for order in (torch.arange(128).roll(50), torch.arange(128).flip(0)):
        moved = torch.cat((weight[order], weight[128:]))
        torch.testing.assert_close(gptq.gptq(moved, x.T @ x, "fp8_block", 128).scales, scales)


@pytest.mark.parametrize("name", ["int8", "int4", "int4_asym"])
def test_exact_where_the_weight_can_be_represented(name):
    x = correlated(256, 96)
    low, high = (1, 255) if name == "int8" else (0, 15)
    codes = torch.randint(low, high + 1, (8, 96), dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = low, high
    groups = empty((8, 96), name, 32).row_scales().shape
    zeros = torch.full(groups, 7.0) if name == "int4_asym" else None
    weight = from_codes(codes, torch.full(groups, 0.25), zeros, name, 32).dequantize()
    assert output_error(x, weight, gptq.gptq(weight, x.T @ x, name, 32)) < 1e-6


def test_dead_and_dependent_columns():
    """Inputs that are always 0 or copies of each other leave no positive definite X^T X."""
    x, weight = correlated(64, 100), torch.randn(8, 100)
    x[:, 10:20] = 0
    x[:, 20:60] = x[:, 60:100]
    quantized = gptq.gptq(weight, x.T @ x, "int4", 32)
    assert bool(torch.isfinite(quantized.dequantize()).all())
    assert output_error(x, weight, quantized) < output_error(x, weight, quantize(weight, "int4"))
    dead = (quantized.dequantize() - weight)[:, 10:20]
    assert dead.norm() < 0.3 * weight[:, 10:20].norm()


def test_indefinite_by_rounding_is_damped():
    hessian = torch.eye(40)
    hessian[0, 1] = hessian[1, 0] = 1.5
    quantized = gptq.gptq(torch.randn(4, 40), hessian, "int4", 32)
    assert bool(torch.isfinite(quantized.dequantize()).all())


def test_no_inputs_at_all():
    weight = torch.randn(4, 40)
    ours = gptq.gptq(weight, torch.zeros(40, 40), "int4", 32)
    assert torch.equal(ours.codes(), quantize(weight, "int4", 32).codes())


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="gptq: hessian must be finite"):
        gptq.gptq(torch.randn(4, 8), torch.full((8, 8), float("nan")), "int4", 32)


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10)
    )


def change(model, quantized, x):
    with torch.no_grad():
        return ((quantized(x) - model(x)).norm() / model(x).norm()).item()


@pytest.mark.parametrize("scheme", ["int4", "int4_a16", "nf4"])
def test_a_calibrated_model_is_closer(scheme):
    x = correlated(2048, 64) / 5
    calibrated, rounded = network(), network()
    report = quantize_(calibrated, scheme, 32, calibration=list(x[:1024].split(256)))
    quantize_(rounded, scheme, 32)
    assert [layer.name for layer in report.layers] == ["0", "2", "4"]
    assert change(network(), calibrated, x[1024:]) < 0.8 * change(network(), rounded, x[1024:])


def test_later_layers_see_what_earlier_ones_now_give():
    x = correlated(512, 64) / 5
    model = network()
    quantize_(model, "int4_a16", 32, calibration=[x])
    with torch.no_grad():
        hidden = model[1](model[0](x))
    expected = gptq.gptq(network()[2].weight, hidden.T @ hidden, "int4_a16", 32)
    assert (model[2].qweight.codes() != expected.codes()).float().mean() < 0.01


def test_packed_projections_are_calibrated():
    torch.manual_seed(0)
    layer = llmos_fast.TransformerEncoderLayer(32, 4, 64, dropout=0.5, batch_first=True)
    x = torch.randn(16, 12, 32) @ torch.randn(32, 32)
    closest = {}
    for name, arguments in {"gptq": {"calibration": [x]}, "mse": {}}.items():
        model = nn.Sequential(layer.__class__(32, 4, 64, dropout=0.5, batch_first=True))
        model[0].load_state_dict(layer.state_dict())
        report = quantize_(model, "int4_a16", 32, **arguments)
        assert next(one.name for one in report.layers) == "0.self_attn.in_proj"
        assert model.training
        assert not report.notes
        q = model[0].self_attn.in_proj.qweight
        closest[name] = output_error(x.flatten(0, 1), layer.self_attn.in_proj_weight.detach(), q)
    assert closest["gptq"] < 0.8 * closest["mse"]


def test_arguments_of_every_kind_reach_the_model():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.never = nn.Linear(8, 8)

        def forward(self, a, b):
            return {"result": self.first(a + b)}

    a, b = torch.randn(2, 4, 8)
    for inputs in ((a, b), [a, b], {"a": a, "b": b}):
        model = Sum()
        report = quantize_(model, "int4", 32, calibration=iter([inputs]))
        assert isinstance(model.first, QuantLinear)
        note = "never does not run on the calibration data: rounded without it"
        assert report.notes == [note]
    with pytest.raises(ValueError, match=r"calibration must hold tensors, .* got int"):
        quantize_(Sum(), "int4", 32, calibration=[3])


def test_a_model_that_fails_on_the_data_stays_as_it_was():
    model = nn.Sequential(
        llmos_fast.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 2)
    )
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match="last dimension of x"):
        quantize_(model, "int4", 32, calibration=[torch.randn(2, 3, 8), torch.randn(2, 3, 8, 1, 1)])
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in model.named_parameters())


def test_bits_go_where_the_output_needs_them():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.quiet, self.loud, self.still = (nn.Linear(64, 64, bias=False) for _ in range(3))

        def forward(self, x):
            return self.quiet(x) + 2 * self.loud(x) + self.still(x) / 2

    report = quantize_(Parallel(), "int4", 32, calibration=[torch.randn(256, 64)], bits=6.1)
    schemes = {layer.name: layer.scheme for layer in report.layers}
    assert schemes == {"quiet": "int4", "loud": "int8", "still": "int4"}
    # int4: 4 + 16 / 32 bits; int8: 8 + 32 / 64
    assert report.bits == (4.5 + 8.5 + 4.5) / 3
    assert "3 weights of 5.83 bits" in str(report)


@pytest.mark.parametrize(("bits", "expected"), [(4.5, "int4_a16"), (9.0, "int8_a16")])
def test_the_budget_at_its_ends(bits, expected):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    report = quantize_(
        model, "int4_a16", 32, method="mse", calibration=[torch.randn(9, 64)], bits=bits
    )
    assert {layer.scheme for layer in report.layers} == {expected}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "method must be one of mse, absmax, gptq, got 'best'"),
        ({"method": "gptq"}, "calibration must be given for method='gptq', got None"),
        ({"bits": 5.0}, "calibration must be given for bits=5.0, got None"),
        ({"calibration": []}, "calibration must hold at least one input, got none"),
        ({"bits": 4.2, "calibration": [torch.ones(1, 64)]}, "bits must be at least 4.5"),
        (
            {"scheme": "int8", "bits": 9.0, "calibration": [torch.ones(1, 64)]},
            "scheme must be a 4-bit one for bits=9.0, got 'int8'",
        ),
    ],
    ids=["method", "gptq", "bits", "empty", "few bits", "wide scheme"],
)
def test_bad_arguments_are_refused(arguments, message):
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=f"quantize_: {message}"):
        quantize_(model, **{"scheme": "int4", "group_size": 32} | arguments)
    assert type(model[0]) is nn.Linear
