import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn as torch_nn

from llmos_fast import nn

E, H = 24, 4


def padding(lengths, seq):
    return torch.arange(seq) >= torch.tensor(lengths)[:, None]


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def inputs(batch, seq_q, seq_k, batch_first, kdim=E, vdim=E):
    shapes = ((batch, seq_q, E), (batch, seq_k, kdim), (batch, seq_k, vdim))
    tensors = [torch.randn(s) for s in shapes]
    return tensors if batch_first else [t.transpose(0, 1).contiguous() for t in tensors]


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim": {"kdim": 7, "vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7, "vdim": 10},
}


@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_agrees_with_torch(agree, copies, batch_first, options, need_weights):
    mine, theirs = copies(
        nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H, batch_first=batch_first, **options
    )
    sizes = {"kdim": mine.kdim, "vdim": mine.vdim}
    tensors = inputs(3, 7, 5, batch_first, **sizes)
    mask = torch.rand(7, 5) < 0.3
    mask[:, 0] = False
    for attn_mask in (None, mask, torch.randn(3 * H, 7, 5)):
        for key_padding_mask in (None, padding([5, 2, 4], 5)):
            kwargs = {
                "attn_mask": attn_mask,
                "key_padding_mask": key_padding_mask,
                "need_weights": need_weights,
            }
            agree(mine, theirs, tensors, kwargs)


def test_one_input_is_projected_at_once(agree, copies):
    mine, theirs = copies(nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H)

    class Self(torch_nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x, memory=None):
            other = x if memory is None else memory
            return self.attention(x, other, other, need_weights=False)[0]

    agree(Self(mine), Self(theirs), [torch.randn(6, 2, E)])
    agree(Self(mine), Self(theirs), [torch.randn(6, 2, E), torch.randn(9, 2, E)])


@pytest.mark.parametrize("average", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("batched", [False, True], ids=["unbatched", "batched"])
def test_weights(copies, average, batched):
    mine, theirs = copies(
        nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H, batch_first=True
    )
    q, k, v = inputs(2, 6, 5, True)
    hidden = padding([5, 3], 5)
    if not batched:
        q, k, v, hidden = q[1], k[1], v[1], hidden[1]
    call = {"key_padding_mask": hidden, "average_attn_weights": average}
    out, weights = mine(q, k, v, **call)
    true_out, true_weights = theirs(q, k, v, **call)
    assert weights.shape == true_weights.shape
    torch.testing.assert_close(weights, true_weights)
    torch.testing.assert_close(out, true_out)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_hidden_rows_are_zero(training, need_weights, kind):
    attention = nn.MultiheadAttention(E, H, batch_first=True).train(training)
    torch.nn.init.ones_(attention.out_proj.bias)
    x = torch.randn(2, 5, E, requires_grad=True)
    hidden = padding([0, 3], 5)
    hidden = hidden if kind == "bool" else additive(hidden)
    out, weights = attention(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
    assert torch.equal(out[0], torch.ones(5, E))
    assert weights is None or not weights[0].any()
    out.square().sum().backward()
    assert not x.grad[0].any()
    assert all(torch.isfinite(p.grad).all() for p in attention.parameters())

    row_hidden = torch.zeros(5, 5, dtype=torch.bool)
    row_hidden[2] = True
    mask = row_hidden if kind == "bool" else additive(row_hidden)
    out, _ = attention(x, x, x, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(out[:, 2], torch.ones(2, E))


@pytest.mark.parametrize("attn_kind", ["bool", "float"])
@pytest.mark.parametrize("padding_kind", ["bool", "float"])
def test_mask_dtypes_mix_without_warning(agree, copies, attn_kind, padding_kind):
    mine, theirs = copies(nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    hidden = padding([6, 4, 1], 6)
    kwargs = {
        "attn_mask": causal if attn_kind == "bool" else additive(causal),
        "key_padding_mask": hidden if padding_kind == "bool" else additive(hidden),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(*[torch.randn(6, 3, E)] * 3, **kwargs)
    agree(mine, theirs, inputs(3, 6, 6, False), kwargs)


def test_additive_padding_mask(agree, copies):
    mine, theirs = copies(nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H)
    kwargs = {"key_padding_mask": torch.randn(3, 6), "attn_mask": torch.randn(6, 6)}
    agree(mine, theirs, inputs(3, 6, 6, False), kwargs)


def test_causal_hint_needs_no_mask(copies):
    mine, theirs = copies(nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H)
    x = torch.randn(6, 2, E)
    mask = torch_nn.Transformer.generate_square_subsequent_mask(6)
    want = theirs(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(mine(x, x, x, is_causal=True)[0], want)
    torch.testing.assert_close(mine(x, x, x, is_causal=True, need_weights=False)[0], want)


def test_a_mask_that_changes_in_place_is_read_again(copies):
    mine, theirs = copies(nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H)
    x = torch.randn(6, 2, E)
    mask = torch_nn.Transformer.generate_square_subsequent_mask(6)
    hidden = padding([6, 2], 6)
    for _ in range(2):
        call = {"attn_mask": mask, "key_padding_mask": additive(hidden), "need_weights": False}
        torch.testing.assert_close(mine(x, x, x, **call)[0], theirs(x, x, x, **call)[0])
        mask[1, 3] = 0.5
        hidden[1, 0] = True


def test_gradient_of_an_additive_mask(copies):
    mine, theirs = copies(nn.MultiheadAttention, torch_nn.MultiheadAttention, E, H)
    x, weight = torch.randn(6, 2, E), torch.randn(6, 2, E)
    gradients = []
    for module in (mine, theirs):
        mask = torch.full((6, 6), -torch.inf).triu_(1).requires_grad_()
        (module(x, x, x, attn_mask=mask, need_weights=False)[0] * weight).sum().backward()
        gradients.append(mask.grad)
    torch.testing.assert_close(*gradients)


def test_grouped_queries_are_repeated_keys():
    torch.manual_seed(0)
    grouped = nn.MultiheadAttention(E, H, num_kv_heads=2, batch_first=True)
    full = torch_nn.MultiheadAttention(E, H, batch_first=True)
    dim = E // H
    with torch.no_grad():
        q, k, v = grouped.in_proj_weight.split((E, 2 * dim, 2 * dim))
        k, v = (t.view(2, dim, E).repeat_interleave(2, 0).view(E, E) for t in (k, v))
        full.in_proj_weight.copy_(torch.cat((q, k, v)))
        full.out_proj.load_state_dict(grouped.out_proj.state_dict())
    x = torch.randn(2, 7, E)
    for need_weights in (False, True):
        out, _ = grouped(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(out, full(x, x, x)[0])


def test_window_is_a_band_mask():
    attention = nn.MultiheadAttention(E, H, window=(2, 1))
    plain = nn.MultiheadAttention(E, H)
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(9, 2, E)
    distance = torch.arange(9) - torch.arange(9)[:, None]
    band = (distance < -2) | (distance > 1)
    want = plain(x, x, x, attn_mask=band)[0]
    torch.testing.assert_close(attention(x, x, x)[0], want)
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], want)


def test_rotary_depends_on_distance_only():
    attention = nn.MultiheadAttention(E, H, rotary=True, batch_first=True)
    x = torch.randn(1, 8, E)
    alone = attention(x, x, x, need_weights=False)[0]
    shifted = torch.cat((torch.randn(1, 5, E), x), dim=1)
    hidden = torch.zeros(1, 13, dtype=torch.bool)
    hidden[:, :5] = True
    out = attention(shifted, shifted, shifted, key_padding_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(out[:, 5:], alone)
    turned = x.flip(1)
    assert not torch.allclose(attention(turned, turned, turned)[0].flip(1), alone)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"key_padding_mask": torch.zeros(2, 9, dtype=torch.bool)}, "key_padding_mask must have"),
        ({"attn_mask": torch.zeros(5, 6)}, "attn_mask must have shape"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "attn_mask must be bool or"),
    ],
    ids=["padding", "shape", "dtype"],
)
def test_bad_masks(arguments, match):
    x = torch.randn(5, 2, E)
    with pytest.raises(ValueError, match=f"MultiheadAttention: {match}"):
        nn.MultiheadAttention(E, H)(x, x, x, **arguments)


def test_bad_arguments():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads"):
        nn.MultiheadAttention(10, 4)
    with pytest.raises(ValueError, match="num_kv_heads must divide"):
        nn.MultiheadAttention(E, H, num_kv_heads=3)
    with pytest.raises(ValueError, match="query must have 2 dimensions"):
        nn.MultiheadAttention(E, H)(*[torch.randn(5, 2, E + 1)] * 3)
    with pytest.raises(ValueError, match="key must have the batch of query"):
        nn.MultiheadAttention(E, H)(torch.randn(5, 2, E), *[torch.randn(5, 3, E)] * 2)


def test_dropout_follows_the_seed():
    attention = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, E)
    for need_weights in (False, True):
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(attention(x, x, x, need_weights=need_weights)[0])
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])
    attention.eval()
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


def test_dropout_keeps_the_mean():
    attention = nn.MultiheadAttention(E, H, dropout=0.3, batch_first=True)
    x = torch.randn(1, 6, E)
    want = attention.eval()(x, x, x, need_weights=False)[0]
    attention.train()
    many = x.expand(4000, -1, -1).contiguous()
    out = attention(many, many, many, need_weights=False)[0]
    error = (out.mean(0) - want[0]).abs()
    assert (error < 5 * out.std(0) / 4000**0.5).all()


@settings(max_examples=30, deadline=None)
@given(
    seq_q=st.integers(1, 9),
    seq_k=st.integers(1, 9),
    batch=st.integers(1, 3),
    batch_first=st.booleans(),
    mask_dim=st.sampled_from([None, 2, 3]),
    padded=st.booleans(),
    need_weights=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_options(seq_q, seq_k, batch, batch_first, mask_dim, padded, need_weights, seed):
    torch.manual_seed(seed)
    mine = nn.MultiheadAttention(E, H, batch_first=batch_first)
    theirs = torch_nn.MultiheadAttention(E, H, batch_first=batch_first)
    theirs.load_state_dict(mine.state_dict())
    tensors = inputs(batch, seq_q, seq_k, batch_first)
    shape = {None: None, 2: (seq_q, seq_k), 3: (batch * H, seq_q, seq_k)}[mask_dim]
    mask = None if shape is None else (torch.rand(shape) < 0.4)
    if mask is not None:
        mask[..., 0] = False
    hidden = None
    if padded:
        hidden = torch.rand(batch, seq_k) < 0.4
        hidden[:, 0] = False
    call = {"attn_mask": mask, "key_padding_mask": hidden, "need_weights": need_weights}
    out, weights = mine(*tensors, **call)
    true_out, true_weights = theirs(*tensors, **call)
    torch.testing.assert_close(out, true_out)
    if need_weights:
        torch.testing.assert_close(weights, true_weights)
