import pytest
import torch
from torch import nn as torch_nn

from llmos_fast import nn
from llmos_fast.testing import assert_close_to_truth

E, H, FF = 16, 4, 24
OPTIONS = {
    "post": {},
    "pre": {"norm_first": True},
    "batch_first": {"batch_first": True},
    "rotary": {"rotary": True, "batch_first": True},
    "kv_heads": {"num_kv_heads": 2},
    "window": {"window": (3, 0)},
    "llama": {
        "norm_first": True,
        "rotary": True,
        "num_kv_heads": 1,
        "norm": "rms",
        "activation": "swiglu",
    },
}


def padding(lengths, seq):
    return torch.arange(seq) >= torch.tensor(lengths)[:, None]


def encoder(positions=None, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, **options)
    return nn.TransformerEncoder(layer, 2, positions=positions, max_length=32).eval()


def decoder(**options):
    torch.manual_seed(0)
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, FF, 0.0, **options), 2).eval()


def sequence(seq, batch_first, batch=3):
    return torch.randn(batch, seq, E) if batch_first else torch.randn(seq, batch, E)


def assert_same(out, full, module, x, *arguments, **kwargs):
    truth = module.double()(x.double(), *(a.double() for a in arguments), **kwargs)
    module.float()
    assert_close_to_truth(out, full, truth, reduction=256)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 1, 4], [11]], ids=["ones", "mixed", "whole"])
@torch.no_grad()
def test_encoder_decodes_as_a_causal_model(options, chunks):
    model = encoder(**options)
    dim = 1 if options.get("batch_first") else 0
    x = sequence(11, dim == 1)
    cache = model.new_cache(3, 4)
    out = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim)], dim)
    assert cache.length == 11
    assert_same(out, model(x, is_causal=True), model, x, is_causal=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_decoder_keeps_the_memory(options):
    model = decoder(**options)
    dim = 1 if options.get("batch_first") else 0
    x, memory = sequence(7, dim == 1), sequence(5, dim == 1)
    hidden = padding([5, 2, 0], 5)
    call = {"memory_key_padding_mask": hidden}
    cache = model.new_cache(3)
    parts = x.split([3, 1, 1, 2], dim)
    outs = [model(parts[0], memory, cache=cache, **call)]
    kept = cache.layers[0].memory[0]
    outs += [model(parts[1], memory, cache=cache, **call)]
    outs += [model(part, None, cache=cache, **call) for part in parts[2:]]
    assert cache.layers[0].memory[0] is kept
    full = model(x, memory, tgt_is_causal=True, **call)
    assert_same(torch.cat(outs, dim), full, model, x, memory, tgt_is_causal=True, **call)

    other = sequence(5, dim == 1)
    cache.reset()
    out = model(x, other, cache=cache)
    assert_same(out, model(x, other, tgt_is_causal=True), model, x, other, tgt_is_causal=True)


@pytest.mark.parametrize("positions", [None, "learned", "sinusoidal"])
@torch.no_grad()
def test_positions_go_on(positions):
    model = encoder(positions)
    x = sequence(9, False)
    cache = model.new_cache(3)
    out = torch.cat([model(part, cache=cache) for part in x.split([4, 5])])
    torch.testing.assert_close(out, model(x, is_causal=True))


@torch.no_grad()
def test_padding_is_remembered():
    model = encoder(batch_first=True)
    x = sequence(8, True)
    hidden = torch.zeros(3, 8, dtype=torch.bool)
    hidden[1, :3], hidden[2, 4:6] = True, True  # left of the prompt, and behind it
    want = model(x, is_causal=True, mask=None, src_key_padding_mask=hidden)
    cache = model.new_cache(3)
    outs = [
        model(x[:, :5], src_key_padding_mask=hidden[:, :5], cache=cache),
        model(x[:, 5:6], src_key_padding_mask=hidden[:, 5:6], cache=cache),
        model(x[:, 6:7], cache=cache),
        model(x[:, 7:], src_key_padding_mask=hidden, cache=cache),
    ]
    visible = ~hidden[..., None]
    torch.testing.assert_close(torch.cat(outs, 1) * visible, want * visible)


@torch.no_grad()
def test_beams_are_reordered():
    model = decoder(batch_first=True)
    x, memory = sequence(6, True), sequence(5, True)
    cache = model.new_cache(3)
    model(x[:, :4], memory, cache=cache)
    index = torch.tensor([2, 2, 0, 1])
    cache.reorder(index)
    x, memory = x[index], memory[index]
    want = model(x, memory, tgt_is_causal=True)
    torch.testing.assert_close(model(x[:, 4:5], None, cache=cache), want[:, 4:5])
    torch.testing.assert_close(model(x[:, 5:], memory, cache=cache), want[:, 5:])


@torch.no_grad()
def test_room_doubles_and_is_kept():
    model = encoder()
    cache = model.new_cache(3, 2)
    x = sequence(9, False)
    for part in x.split(1):
        model(part, cache=cache)
    assert cache.layers[0]._keys.shape[2] == 16
    kept = cache.layers[0]._keys
    cache.reset()
    assert cache.length == 0
    torch.testing.assert_close(model(x, cache=cache), model(x, is_causal=True))
    assert cache.layers[0]._keys is kept


@torch.no_grad()
def test_single_layer_and_observed_attention():
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0).eval()
    x = sequence(6, False)
    want = layer(x, is_causal=True)
    for _ in range(2):
        cache = nn.LayerCache()
        out = torch.cat([layer(part, cache=cache) for part in x.split([4, 2])])
        torch.testing.assert_close(out, want)
        layer.self_attn.register_forward_hook(lambda m, a, out: None)


@torch.no_grad()
def test_attention_weights_with_a_cache():
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    x, cache = sequence(6, True), nn.LayerCache()
    attention(*[x[:, :4]] * 3, cache=cache)
    out, weights = attention(*[x[:, 4:]] * 3, cache=cache)
    want, want_weights = attention(x, x, x, is_causal=True)
    torch.testing.assert_close(out, want[:, 4:])
    torch.testing.assert_close(weights, want_weights[:, 4:])


def test_gradients_are_refused():
    model = encoder(batch_first=True)
    with pytest.raises(ValueError, match="need no gradient"):
        model(sequence(3, True), cache=model.new_cache(3))


@torch.no_grad()
def test_refusals():
    model, stack, x = encoder(batch_first=True), decoder(), sequence(3, True)
    with pytest.raises(ValueError, match="batch size must be 2, got 3"):
        model(x, cache=model.new_cache(2))
    with pytest.raises(ValueError, match="key_padding_mask must be bool of shape"):
        model(x, src_key_padding_mask=torch.zeros(3, 4), cache=model.new_cache(3))
    with pytest.raises(ValueError, match="memory must be given in the first call"):
        stack(x, None, cache=stack.new_cache(3))
    with pytest.raises(ValueError, match="max_length must be positive"):
        model.new_cache(3, 0)


@torch.no_grad()
def test_quantized_projections_are_called():
    class Quantized(torch_nn.Module):
        def __init__(self, weight, bias):
            super().__init__()
            self.out_features, self.in_features = weight.shape
            self.register_buffer("kept", weight.clone())
            self.register_buffer("bias", None if bias is None else bias.clone())

        def forward(self, x):
            return torch.nn.functional.linear(x, self.kept, self.bias)

    model = nn.Transformer(E, H, 1, 1, FF, 0.0).eval()
    kdim = nn.MultiheadAttention(E, H, kdim=7, vdim=5)
    src, tgt, key, value = sequence(5, False), sequence(4, False), torch.randn(5, 3, 7), None
    value = torch.randn(5, 3, 5)
    want = model(src, tgt, tgt_is_causal=True), kdim(src, key, value)[0]
    for module in (*model.modules(), kdim):
        if hasattr(module, "quantize_projections_"):
            module.quantize_projections_(lambda _, weight, bias: Quantized(weight, bias))
            assert module.in_proj_weight is None
        for name, child in list(module.named_children()):
            if isinstance(child, torch_nn.Linear) and not isinstance(module, Quantized):
                setattr(module, name, Quantized(child.weight, child.bias))
    torch.testing.assert_close(model(src, tgt, tgt_is_causal=True), want[0])
    torch.testing.assert_close(kdim(src, key, value)[0], want[1])
