import copy
import warnings

import pytest
import torch
from torch import nn as torch_nn

from llmos_fast import nn

E, H, FF = 16, 4, 24


class OwnLayer(torch_nn.TransformerEncoderLayer):
    def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
        return 2 * super()._sa_block(x, attn_mask, key_padding_mask, is_causal)


class Model(torch_nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch_nn.Linear(E, E)
        self.transformer = torch_nn.Transformer(E, H, 2, 2, FF, 0.0)
        self.blocks = torch_nn.ModuleList([OwnLayer(E, H, FF, 0.0)])
        self.attention = torch_nn.MultiheadAttention(E, H)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.attention(self.transformer(x, x), x, x)[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Model().eval()


def test_swaps_in_place_and_back(model):
    x = torch.randn(5, 2, E)
    want, parameters = model(x), list(model.parameters())
    modules, names = list(model.modules()), list(model.state_dict())
    classes = [type(m) for m in modules]
    calls = []
    model.transformer.decoder.layers[0].register_forward_hook(lambda *a: calls.append(1))

    report = nn.accelerate(model)
    assert type(model.transformer) is nn.Transformer
    assert type(model.transformer.encoder.layers[1].self_attn) is nn.MultiheadAttention
    assert "transformer.decoder.layers.1.multihead_attn" in report.changed
    assert report.left == [("blocks.0", "OwnLayer is a class derived from torch.nn's")]
    assert type(model.blocks[0]) is OwnLayer
    assert type(model.blocks[0].self_attn) is nn.MultiheadAttention
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert not any(m.training for m in model.modules())
    calls.clear()
    torch.testing.assert_close(model(x), want)
    assert calls == [1]
    assert nn.accelerate(model).changed == []

    assert nn.restore(model).changed == report.changed
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model(x), want)


def test_the_model_itself(model):
    layer = torch_nn.TransformerEncoderLayer(E, H, FF, 0.0)
    x = torch.randn(5, 2, E)
    want = layer(x)
    assert nn.accelerate(layer).changed == ["", "self_attn"]
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(copy.deepcopy(layer)(x), want)


def test_restore_leaves_what_torch_cannot_do():
    model = torch_nn.Sequential(
        nn.TransformerEncoderLayer(E, H, FF, 0.0, rotary=True),
        nn.TransformerEncoderLayer(E, H, FF, 0.0, "swiglu"),
        nn.TransformerEncoderLayer(E, H, FF, 0.0),
    )
    report = nn.restore(model)
    assert report.changed == ["1.self_attn", "2", "2.self_attn"]
    assert [name for name, _ in report.left] == ["0", "0.self_attn", "1"]
    assert type(model[2]) is torch_nn.TransformerEncoderLayer


def test_optimizer_goes_on(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.accelerate(model.train())
    before = model.transformer.encoder.layers[0].linear1.weight.clone()
    model(torch.randn(5, 2, E)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.transformer.encoder.layers[0].linear1.weight, before)
