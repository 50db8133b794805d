import itertools
import warnings

import pytest
import torch
from torch import nn as torch_nn

from llmos_fast import nn, ops

E, H, FF = 16, 4, 24
MODEL = (nn.Transformer, torch_nn.Transformer)


def padding(lengths, seq):
    return torch.arange(seq) >= torch.tensor(lengths)[:, None]


def causal_mask(seq):
    return torch_nn.Transformer.generate_square_subsequent_mask(seq)


def source_and_target(batch_first, batch=3, seq_k=9, seq_q=6):
    src, tgt = torch.randn(batch, seq_k, E), torch.randn(batch, seq_q, E)
    return [src, tgt] if batch_first else [t.transpose(0, 1).contiguous() for t in (src, tgt)]


def test_same_seed_same_weights():
    for options in ({}, {"bias": False}, {"norm_first": True, "activation": "gelu"}):
        torch.manual_seed(5)
        mine = nn.Transformer(E, H, 2, 2, FF, **options)
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch_nn.Transformer(E, H, 2, 2, FF, **options)
        ours, want = mine.state_dict(), theirs.state_dict()
        assert list(ours) == list(want)
        assert all(torch.equal(ours[name], want[name]) for name in want)
        theirs.load_state_dict(ours)
        mine.load_state_dict(want)


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_generator_advances_as_torchs(name):
    states = []
    for module in (nn, torch_nn):
        torch.manual_seed(5)
        getattr(module, name)(E, H)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_is_a_torch_transformer():
    model = nn.Transformer(E, H, 1, 1, FF)
    for path in ("", "encoder", "encoder.layers.0", "decoder", "decoder.layers.0"):
        module = model.get_submodule(path)
        assert isinstance(module, getattr(torch_nn, type(module).__name__))
    attention = model.decoder.layers[0].multihead_attn
    assert type(attention) is nn.MultiheadAttention
    assert isinstance(attention, torch_nn.MultiheadAttention)


@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("masks", ["none", "causal", "padding", "all", "source only"])
def test_agrees_with_torch(agree, copies, batch_first, norm_first, masks):
    mine, theirs = copies(
        *MODEL, E, H, 2, 2, FF, 0.0, batch_first=batch_first, norm_first=norm_first
    )
    src_hidden, tgt_hidden = padding([9, 2, 5], 9), padding([6, 3, 6], 6)
    kwargs = {}
    if masks in ("causal", "all"):
        kwargs |= {"tgt_mask": causal_mask(6), "tgt_is_causal": True}
    if masks in ("padding", "all"):
        kwargs |= {"tgt_key_padding_mask": tgt_hidden, "memory_key_padding_mask": src_hidden}
    if masks in ("padding", "all", "source only"):
        kwargs |= {"src_key_padding_mask": src_hidden}
    if masks == "all":
        kwargs |= {"memory_mask": torch.randn(6, 9), "src_mask": torch.randn(9, 9)}
    inputs = source_and_target(batch_first)

    class TargetFirst(torch_nn.Module):  # the output has the target's shape
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tgt, src, **masks):
            return self.model(src, tgt, **masks)

    agree(TargetFirst(mine), TargetFirst(theirs), inputs[::-1], kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_decoder_layer(agree, copies, dtype, norm_first):
    mine, theirs = copies(
        nn.TransformerDecoderLayer, torch_nn.TransformerDecoderLayer, E, H, FF, 0.0,
        norm_first=norm_first, bias=False,
    )  # fmt: skip
    inputs = [torch.randn(6, 2, E), torch.randn(9, 2, E)]
    agree(mine, theirs, inputs, {"tgt_mask": causal_mask(6)}, dtype=dtype)
    inputs = [torch.randn(6, E), torch.randn(9, E)]
    agree(mine, theirs, inputs, {"memory_key_padding_mask": torch.arange(9) > 4}, dtype=dtype)


def test_arguments_by_position(copies):
    mine, theirs = copies(*MODEL, E, H, 1, 1, FF, 0.0)
    arguments = (
        *source_and_target(False), torch.randn(9, 9), causal_mask(6), torch.randn(6, 9),
        torch.zeros(3, 9), torch.zeros(3, 6), torch.zeros(3, 9), False, True, False,
    )  # fmt: skip
    torch.testing.assert_close(mine(*arguments), theirs(*arguments))


@pytest.mark.parametrize(
    "name", ["self_attn", "multihead_attn", "linear2", "norm3", "dropout3", ""]
)
def test_decoder_hooks_fire(copies, name):
    mine, theirs = copies(*MODEL, E, H, 1, 2, FF, 0.0)
    inputs = source_and_target(False)
    calls = []
    module = mine.decoder.layers[1].get_submodule(name)
    module.register_forward_hook(lambda m, a, out: calls.append(a[0].shape))
    out = mine(*inputs, tgt_mask=causal_mask(6))
    assert [tuple(c[:2]) for c in calls] == [(6, 3)]
    torch.testing.assert_close(out, theirs(*inputs, tgt_mask=causal_mask(6)))


def test_padding_alone_never_gives_nan():
    for batch_first, norm_first in itertools.product((False, True), repeat=2):
        model = nn.Transformer(
            E, H, 2, 2, FF, batch_first=batch_first, norm_first=norm_first, dropout=0.1
        )
        inputs = [t.requires_grad_() for t in source_and_target(batch_first)]
        hidden = torch.ones(3, 9, dtype=torch.bool)
        for training in (False, True):
            out = model.train(training)(
                *inputs,
                src_key_padding_mask=hidden,
                tgt_key_padding_mask=torch.ones(3, 6).bool(),
                memory_key_padding_mask=hidden,
            )
            out.sum().backward()
            assert torch.isfinite(out).all()
            assert all(torch.isfinite(t.grad).all() for t in inputs)


def test_custom_encoder_and_decoder():
    class Encoder(torch_nn.Module):
        def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
            return src

    model = nn.Transformer(E, H, 1, 1, FF, 0.0, custom_encoder=Encoder())
    src, tgt = source_and_target(False)
    torch.testing.assert_close(model(src, tgt), model.decoder(tgt, src))


def test_options_reach_every_layer():
    model = nn.Transformer(
        E, H, 2, 2, FF, 0.0, "swiglu", num_kv_heads=2, rotary=500.0, norm="rms", window=(4, 4),
        positions="learned", max_length=12,
    )  # fmt: skip
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert [a.num_kv_heads for a in attentions] == [2] * 6
    assert [a.rotary_base for a in attentions].count(500.0) == 4
    assert [a.window for a in attentions].count((4, 4)) == 4
    assert isinstance(model.encoder.norm, torch_nn.RMSNorm)
    assert model.encoder.positions.weight.shape == (12, E)
    out = model(*source_and_target(False), tgt_is_causal=True)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_inputs():
    model = nn.Transformer(E, H, 1, 1, FF)
    src, tgt = source_and_target(False)
    with pytest.raises(ValueError, match="tgt must have the batch size of src, 3, got 2"):
        model(src, tgt[:, :2])
    with pytest.raises(ValueError, match="src must end with d_model = 16"):
        model(src[..., :8], tgt)


@pytest.mark.parametrize(
    "src_mask", [torch.zeros(9, 9).bool(), causal_mask(9)], ids=["open", "causal"]
)
def test_padding_that_the_decoder_cannot_see_is_skipped(copies, monkeypatch, src_mask):
    mine, theirs = copies(*MODEL, E, H, 2, 1, FF, 0.0, norm_first=True)
    inputs, hidden = source_and_target(False), padding([9, 2, 5], 9)
    call = {
        "src_mask": src_mask,
        "src_key_padding_mask": hidden,
        "memory_key_padding_mask": hidden,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs(*inputs, **call)
    seen, ffn = [], ops.ffn
    monkeypatch.setattr(ops, "ffn", lambda x, *a, **k: seen.append(x.shape) or ffn(x, *a, **k))
    torch.testing.assert_close(mine(*inputs, **call), want)
    assert seen == [(16, E), (16, E), (3, 6, E)]
