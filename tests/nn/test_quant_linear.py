"""QuantLinear as a module, and quantize_ on models."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmos_fast.nn import TransformerEncoderLayer
from llmos_fast.nn.quant_linear import QuantLinear
from llmos_fast.nn.quantize_model import dequantize_, empty_quantized_, quantize_
from llmos_fast.quantize import SCHEMES, quantize
from llmos_fast.testing import assert_close_to_truth, registered_calls


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 40), nn.GELU(), nn.Linear(40, 9, bias=False))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer_is_the_op_on_its_weight(scheme):
    linear = nn.Linear(70, 9)
    layer = QuantLinear.from_float(linear.weight, linear.bias, scheme, 32)
    x = torch.randn(2, 3, 70)
    expected = nn.functional.linear(x, layer.qweight.dequantize(), linear.bias)
    assert (layer(x) - expected).abs().max() <= 0.02 * expected.abs().max()
    assert torch.equal(layer.dequantize().weight, quantize(linear.weight, scheme, 32).dequantize())
    assert not hasattr(layer, "weight")
    assert f"scheme={scheme}" in repr(layer)


@pytest.mark.parametrize("scheme", ["int8", "int4_asym_a16", "fp8"])
def test_state_dict_through_safetensors(scheme, tmp_path):
    saved = model()
    quantize_(saved, scheme, 32)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    loaded = model()
    for parameter in loaded.parameters():
        parameter.data.mul_(2)
    quantize_(loaded, scheme, 32)
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    empty = nn.Sequential(
        QuantLinear(70, 40, scheme=scheme, group_size=32),
        nn.GELU(),
        QuantLinear(40, 9, bias=False, scheme=scheme, group_size=32),
    )
    empty.load_state_dict(saved.state_dict())
    x = torch.randn(3, 70)
    for other in (loaded, empty, copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert torch.equal(other(x), saved(x))


def test_a_state_dict_of_another_scheme_is_refused():
    int4 = QuantLinear.from_float(torch.randn(4, 64), None, "int4_a16")
    with pytest.raises(ValueError, match="must hold nf4, got int4_a16"):
        QuantLinear(64, 4, bias=False, scheme="nf4").load_state_dict(int4.state_dict())


def test_scales_that_are_not_finite_are_refused():
    layer = QuantLinear.from_float(torch.randn(4, 64), None, "int8")
    state = copy.deepcopy(layer.state_dict())
    state["scales"][0, 0, :4] = float("nan")
    with pytest.raises(ValueError, match="scales must be finite, got 4 of inf or NaN"):
        layer.load_state_dict(state)


def test_casting_keeps_the_scales():
    layer = QuantLinear.from_float(torch.randn(4, 64), torch.zeros(4), "int4")
    scales = layer.scales.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.scales, scales)
    assert layer.double().scales.dtype == torch.bfloat16
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bias_trains_and_the_weight_does_not():
    net = model()
    quantize_(net, "int4_a16", 32)
    assert [name for name, _ in net.named_parameters()] == ["0.bias"]
    net(torch.randn(2, 70)).sum().backward()
    assert net[0].bias.grad.abs().sum() > 0


def test_report_adds_up():
    net = model()
    report = quantize_(net, "int8")
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert report.bytes_before == 4 * (70 * 40 + 40 + 40 * 9)
    # panels of 16 rows, words of 4 columns: 48 x 72 and 16 x 40 codes
    assert report.bytes_after == 72 * 48 + 4 * 48 + 4 * 40 + 40 * 16 + 4 * 16
    assert all(0 < layer.error < 0.01 for layer in report.layers)
    assert "model went from 0.013 to 0.005 MB" in str(report)


def test_skip_takes_patterns():
    net = nn.ModuleDict({"encoder": model(), "head": nn.Linear(9, 2)})
    report = quantize_(net, skip=["encoder.*"])
    assert isinstance(net["encoder"][0], nn.Linear)
    assert isinstance(net["head"], QuantLinear)
    assert report.notes == [f"encoder.{i} is left as it is: named in skip" for i in (0, 2)]


@pytest.mark.parametrize("scheme", ["int8", "int4_asym", "nf4", "fp8"])
def test_a_skeleton_takes_a_state_dict_with_mixed_schemes(scheme):
    quantized = model()
    quantize_(quantized, scheme, 32, skip=["2"])
    quantized[2] = QuantLinear.from_float(quantized[2].weight, None, "int8_a16")
    skeleton = model()
    empty_quantized_(skeleton, scheme, 32, {"2": "int8_a16"})
    skeleton.load_state_dict(quantized.state_dict())
    for ours, theirs in zip(skeleton.modules(), quantized.modules(), strict=True):
        if isinstance(ours, QuantLinear):
            assert torch.equal(ours.qweight.dequantize(), theirs.qweight.dequantize())
    with pytest.raises(ValueError, match="schemes must name layers, got 7"):
        empty_quantized_(model(), scheme, 32, {"7": "int8"})
    with pytest.raises(ValueError, match=r"scheme must be one of .*, got 'int3'"):
        empty_quantized_(model(), scheme, 32, {"2": "int3"})


def test_a_tied_embedding_stays_float():
    net = nn.ModuleDict({"embedding": nn.Embedding(11, 32), "head": nn.Linear(32, 11, bias=False)})
    net["head"].weight = net["embedding"].weight
    before = net["embedding"].weight.clone()
    report = quantize_(net, "int8")
    assert report.notes == ["head was tied to embedding.weight, which stays float"]
    assert torch.equal(net["embedding"].weight, before)
    assert isinstance(net["head"], QuantLinear)


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(8, 8)
    net = nn.ModuleDict({"a": shared, "b": shared})
    report = quantize_(net)
    assert net["a"] is net["b"]
    assert len(report.layers) == 1
    dequantize_(net)
    assert net["a"] is net["b"]


def test_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    net = nn.Sequential(Special(8, 8))
    assert quantize_(net).notes == ["0 is left as it is: Special may do more than nn.Linear"]


@pytest.mark.parametrize("gradients", [True, False])
def test_torch_transformer_keeps_working(gradients):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    net = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 32)
    with torch.set_grad_enabled(gradients):
        before = net(x)
        report = quantize_(net, "int8")
        after = net(x)
        assert 0 < (after - before).abs().max() < 0.1
        dequantize_(net)
        assert isinstance(net.layers[0].linear1, nn.Linear)
        assert net.layers[0].activation_relu_or_gelu == 1
        assert (net(x) - before).abs().max() < 0.1
    assert [layer.name for layer in report.layers] == [
        f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    ]
    assert sum("MultiheadAttention" in note for note in report.notes) == 2


class PackedProjections(nn.Module):
    """What a layer with a packed projection implements."""

    def __init__(self):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
        self.in_proj_bias = nn.Parameter(torch.randn(24))
        self.quantized = None

    def quantize_projections_(self, quantize_weight):
        self.quantized = quantize_weight("in_proj_weight", self.in_proj_weight, self.in_proj_bias)
        self.in_proj_weight = self.in_proj_bias = None

    def dequantize_projections_(self):
        linear = self.quantized.dequantize()
        self.in_proj_weight, self.in_proj_bias = linear.weight, linear.bias
        self.quantized = None

    def forward(self, x):
        if self.quantized is None:
            return nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        return self.quantized(x)


def test_packed_projections():
    net = nn.Sequential(PackedProjections())
    x = torch.randn(3, 8)
    before = net(x)
    report = quantize_(net, "int8")
    assert [layer.name for layer in report.layers] == ["0.in_proj_weight"]
    assert 0 < (net(x) - before).abs().max() < 0.2
    dequantize_(net)
    assert net[0].in_proj_weight.shape == (24, 8)


def test_a_bare_linear_is_refused():
    with pytest.raises(ValueError, match="quantize_: model must contain its Linear layers"):
        quantize_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="scheme must be one of"):
        quantize_(model(), "int3")


def test_compiles_as_one_graph():
    net = model()
    quantize_(net, "int8")
    x = torch.randn(3, 70, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize(("activation", "name"), [("relu", "relu"), ("swiglu", "silu")])
def test_layers_activate_in_the_product(activation, name):
    layer = TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    quantize_(layer, "int8_a16", skip=["self_attn*", "linear2", "linear_up"])
    with registered_calls() as calls, torch.no_grad():
        fused = layer(x)
    _, arguments = calls["llmos_fast::quant_matmul"]
    assert name in arguments
    dequantize_(layer)
    with torch.no_grad():
        assert_close_to_truth(fused, layer(x), layer.double()(x.double()), reduction=64)
