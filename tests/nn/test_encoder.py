import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn as torch_nn
from torch.utils.checkpoint import checkpoint

from llmos_fast import nn, ops, quantize_
from llmos_fast.nn import quant_linear

E, H, FF = 16, 4, 40
LAYER = (nn.TransformerEncoderLayer, torch_nn.TransformerEncoderLayer)


def padding(lengths, seq):
    return torch.arange(seq) >= torch.tensor(lengths)[:, None]


def causal_mask(seq):
    return torch_nn.Transformer.generate_square_subsequent_mask(seq)


def stack(copies, layers=2, norm=False, nested=True, **options):
    """(ours, theirs) with the same weights, different in each layer."""
    made = []
    for layer_class, stack_class in (
        (nn.TransformerEncoderLayer, nn.TransformerEncoder),
        (torch_nn.TransformerEncoderLayer, torch_nn.TransformerEncoder),
    ):
        make = functools.partial(_stack, layer_class, stack_class, layers, norm, nested)
        made.append(make)
    return copies(*made, **options)


def _stack(layer_class, stack_class, layers, norm, nested, **options):
    layer = layer_class(E, H, FF, 0.0, **options)
    made = stack_class(layer, layers, torch_nn.LayerNorm(E) if norm else None, nested)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch_nn.init.xavier_uniform_(parameter)
    return made


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "F.relu": F.relu,
    "tanh gelu": torch_nn.GELU(approximate="tanh"),
    "partial": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "nn.ReLU": torch_nn.ReLU(),
    "any": lambda x: x.sin(),
}


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_layer_agrees_with_torch(agree, copies, norm_first, activation):
    mine, theirs = copies(*LAYER, E, H, FF, 0.0, activation, norm_first=norm_first)
    agree(mine, theirs, [torch.randn(7, 3, E)], {"src_mask": causal_mask(7)})


@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layer_layouts_and_dtypes(agree, copies, batch_first, bias, dtype):
    mine, theirs = copies(*LAYER, E, H, FF, 0.0, batch_first=batch_first, bias=bias)
    agree(mine, theirs, [torch.randn(3, 5, E)], dtype=dtype)
    agree(mine, theirs, [torch.randn(5, E)], dtype=dtype)


@pytest.mark.parametrize("batch_first", [False, True], ids=["seq_first", "batch_first"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("lengths", [None, [9, 1, 4], [0, 9, 3]], ids=["full", "padded", "empty"])
def test_stack_agrees_with_torch(agree, copies, batch_first, norm_first, masked, lengths):
    mine, theirs = stack(copies, norm=True, batch_first=batch_first, norm_first=norm_first)
    hidden = None if lengths is None else padding(lengths, 9)
    valid = None if hidden is None else ~hidden if batch_first else ~hidden.T
    if lengths is not None and 0 in lengths:
        # torch.nn gives NaN for a sequence without a key: its row is compared with nothing
        theirs = WithoutRow(theirs, 0 if batch_first else 1, lengths.index(0))
    x = torch.randn(3, 9, E) if batch_first else torch.randn(9, 3, E)
    kwargs = {"mask": causal_mask(9) if masked else None, "src_key_padding_mask": hidden}
    agree(mine, theirs, [x], kwargs, valid=valid)


class WithoutRow(torch_nn.Module):
    """A torch.nn stack that sees every sequence but one, with the same parameter names."""

    def __init__(self, stack, batch_dim, row):
        super().__init__()
        self.layers, self.norm, self.run = stack.layers, stack.norm, stack.forward
        self._stack, self.batch_dim, self.row = [stack], batch_dim, row

    def forward(self, x, mask, src_key_padding_mask):
        keep = [i for i in range(x.shape[self.batch_dim]) if i != self.row]
        stack = self._stack[0]
        stack = copy.copy(stack)
        stack._modules = {"layers": self.layers, "norm": self.norm}
        out = stack(
            x.index_select(self.batch_dim, torch.tensor(keep)),
            mask=mask,
            src_key_padding_mask=src_key_padding_mask[keep],
        )
        missing = torch.zeros_like(x.select(self.batch_dim, self.row))
        rows = list(out.unbind(self.batch_dim))
        rows.insert(self.row, missing)
        return torch.stack(rows, self.batch_dim)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "lengths", [[9, 1, 4], [0, 0, 3], [0, 0, 0], [9, 9, 9], [8, 9, 9]], ids=str
)
def test_padding_semantics(copies, training, grad, lengths):
    mine, _ = stack(copies, batch_first=True)
    mine.train(training)
    hidden, x = padding(lengths, 9), torch.randn(3, 9, E)
    with torch.set_grad_enabled(grad):
        out = mine(x, src_key_padding_mask=hidden)
    assert out.shape == x.shape
    assert not out[hidden].any()
    assert torch.isfinite(out).all()
    for sequence, length in enumerate(lengths):
        alone = mine(x[sequence : sequence + 1, :length]) if length else x[:1, :0]
        torch.testing.assert_close(out[sequence, :length], alone[0])


def test_padding_is_computed_where_torch_does(copies):
    hidden, x = padding([9, 2], 9), torch.randn(2, 9, E)
    for options in ({"norm_first": True}, {"nested": False}):
        mine, theirs = stack(copies, batch_first=True, **options)
        want = theirs(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(mine(x, src_key_padding_mask=hidden), want)


def test_scattered_padding_gives_zeros_too(copies):
    mine, theirs = stack(copies, batch_first=True)
    hidden, x = torch.rand(2, 9) < 0.5, torch.randn(2, 9, E)
    hidden[:, 3] = False
    want = theirs(x, src_key_padding_mask=hidden).masked_fill(hidden[..., None], 0.0)
    for mask in (
        hidden,
        hidden.T.contiguous().T,
        torch.zeros(2, 9).masked_fill(hidden, -torch.inf),
    ):
        torch.testing.assert_close(mine(x, src_key_padding_mask=mask), want)


def test_hidden_sequences_give_no_nan_anywhere(copies):
    for options in ({}, {"norm_first": True}, {"batch_first": True}):
        mine, _ = stack(copies, **options)
        x = torch.randn(4, 4, E, requires_grad=True)
        out = mine(x, mask=causal_mask(4), src_key_padding_mask=torch.ones(4, 4).bool())
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(x.grad).all()


def test_padded_rows_are_skipped(copies, monkeypatch):
    mine, _ = stack(copies, batch_first=True)
    seen, ffn = [], ops.ffn
    monkeypatch.setattr(ops, "ffn", lambda x, *a, **k: seen.append(x.shape) or ffn(x, *a, **k))
    mine(torch.randn(3, 9, E), src_key_padding_mask=padding([9, 1, 4], 9))
    assert seen == [(14, E), (14, E)]


def test_padded_rows_are_skipped_by_quantized_layers(copies, monkeypatch):
    mine, _ = stack(copies, batch_first=True)
    quantize_(mine.eval(), "int8")
    x, hidden = torch.randn(3, 9, E), padding([9, 1, 4], 9)
    mine.use_nested_tensor = False
    want = mine(x, src_key_padding_mask=hidden).masked_fill(hidden[..., None], 0.0)
    mine.use_nested_tensor = True
    rows, multiply = set(), quant_linear.quant_matmul
    monkeypatch.setattr(
        quant_linear, "quant_matmul", lambda x, *a, **k: rows.add(x.numel()) or multiply(x, *a, **k)
    )
    torch.testing.assert_close(mine(x, src_key_padding_mask=hidden), want)
    assert rows == {14 * E, 14 * FF}


@pytest.mark.parametrize(
    "options",
    [
        {"rotary": True},
        {"window": (2, 2)},
        {"num_kv_heads": 2},
        {
            "rotary": True,
            "window": (3, 0),
            "num_kv_heads": 1,
            "norm": "rms",
            "activation": "swiglu",
        },
    ],
    ids=["rotary", "window", "kv_heads", "all"],
)
def test_skipping_padding_changes_nothing(options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True, **options)
    encoder = nn.TransformerEncoder(layer, 2)
    encoder.use_nested_tensor = True
    hidden, x = padding([9, 1, 4], 9), torch.randn(3, 9, E)
    out = encoder(x, src_key_padding_mask=hidden)
    encoder.use_nested_tensor = False
    want = encoder(x, src_key_padding_mask=hidden).masked_fill(hidden[..., None], 0.0)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "relu2", "gelu_tanh", "silu"])
def test_options_beyond_torch(kind, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, activation, norm=kind, norm_first=True)
    x = torch.randn(5, 2, E)
    norm1, norm2 = layer.norm1, layer.norm2
    assert isinstance(norm1, torch_nn.RMSNorm if kind == "rms" else torch_nn.LayerNorm)
    h = norm1(x)
    y = x + layer.self_attn(h, h, h)[0]
    hidden = layer.activation(layer.linear1(norm2(y)))
    if activation in ("swiglu", "geglu", "reglu"):
        hidden = hidden * layer.linear_up(norm2(y))
    torch.testing.assert_close(layer(x), y + layer.linear2(hidden))


HOOKED = ["self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2", "dropout"]
HOOKED += ["dropout1", "dropout2", "activation", ""]


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_hooks_fire(copies, name, norm_first):
    mine, theirs = stack(copies, activation=torch_nn.GELU(), norm_first=norm_first)
    x = torch.randn(5, 2, E)
    calls = []
    module = mine.layers[1].get_submodule(name)
    module.register_forward_hook(lambda m, a, out: calls.append(a[0].shape))
    module.register_full_backward_hook(lambda m, g_in, g_out: calls.append("backward"))
    out = mine(x, src_key_padding_mask=padding([5, 3], 5), mask=causal_mask(5))
    out.sum().backward()
    assert calls[0][:2] == (5, 2)
    assert calls[1:] == ["backward"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs(x, src_key_padding_mask=padding([5, 3], 5), mask=causal_mask(5))
    torch.testing.assert_close(out, want)


def test_hooks_change_outputs(copies):
    mine, theirs = stack(copies)
    x = torch.randn(5, 2, E)
    for module in (mine, theirs):
        module.layers[0].linear1.register_forward_pre_hook(lambda m, a: (2 * a[0],))
        module.layers[1].norm2.register_forward_hook(lambda m, a, out: out + 1)
    torch.testing.assert_close(mine(x), theirs(x))


def test_replaced_parts_are_called(copies):
    mine, theirs = stack(copies)
    x = torch.randn(5, 2, E)

    class Twice(torch_nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for module in (mine, theirs):
        torch.manual_seed(3)
        module.layers[0].linear1 = Twice(E, FF)
        module.layers[0].norm1 = torch_nn.Identity()
        torch_nn.utils.parametrizations.weight_norm(module.layers[1].linear2)
        module.layers[1].dropout1 = torch_nn.Identity()
    torch.testing.assert_close(mine(x), theirs(x))


def test_own_layers_in_the_stack(copies):
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal) + 1

    layer = Layer(E, H, FF, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    x, hidden = torch.randn(2, 5, E), padding([5, 2], 5)
    want = encoder.layers[1](encoder.layers[0](x, None, hidden), None, hidden)
    want = want.masked_fill(hidden[..., None], 0.0)
    torch.testing.assert_close(encoder(x, src_key_padding_mask=hidden), want)
    foreign = nn.TransformerEncoder(torch_nn.TransformerEncoderLayer(E, H, FF, 0.0), 2)
    x = x.transpose(0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = foreign(x, mask=causal_mask(5), src_key_padding_mask=hidden)
    mine, _ = stack(copies)
    mine.load_state_dict(foreign.state_dict())
    torch.testing.assert_close(mine(x, causal_mask(5), hidden), out)


def test_dropout_is_where_torch_has_it(copies):
    """Each of the four probabilities is read from its module when it is called."""
    mine, _ = copies(*LAYER, E, H, FF, 0.0)
    x = torch.randn(5, 2, E)
    want = mine(x)
    for name in ("dropout", "dropout1", "dropout2"):
        module = mine.get_submodule(name)
        module.p = 0.5
        torch.manual_seed(1)
        first = mine(x)
        torch.manual_seed(1)
        assert torch.equal(mine(x), first)
        assert not torch.allclose(first, want)
        assert torch.equal(mine.eval()(x), mine(x))
        torch.testing.assert_close(mine(x), want)
        mine.train()
        module.p = 0.0
    mine.self_attn.dropout = 0.5
    assert not torch.allclose(mine(x), want)
    mine.self_attn.dropout = 0.0
    mine.dropout1.p = mine.dropout2.p = 1.0
    torch.testing.assert_close(mine(x), mine.norm2(mine.norm1(x)))


def test_copies_and_pickles(copies):
    mine, _ = stack(copies, batch_first=True)
    x = torch.randn(2, 5, E)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(other(x), mine(x))
        assert other.layers[0].linear1.weight is not mine.layers[0].linear1.weight


def test_autocast(copies):
    mine, theirs = stack(copies, norm=True)
    x = torch.randn(5, 2, E)
    with torch.autocast("cpu", torch.bfloat16):
        out, want = mine(x), theirs(x)
    assert out.dtype == want.dtype
    torch.testing.assert_close(out, want, atol=0.05, rtol=0.05)


def test_learned_and_sinusoidal_positions():
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0)
    x = torch.randn(5, 2, E)
    plain = nn.TransformerEncoder(layer, 1)
    learned = nn.TransformerEncoder(layer, 1, positions="learned", max_length=8)
    torch.testing.assert_close(learned(x), plain(x + learned.positions.weight[:5, None]))
    assert "positions.weight" in learned.state_dict()
    with pytest.raises(ValueError, match="within max_length = 8, got 9"):
        learned(torch.randn(9, 2, E))
    table = nn.TransformerEncoder(layer, 1, positions="sinusoidal").positions(torch.zeros(1, 3, E))
    torch.testing.assert_close(table[0, 2, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(table[0, 2, 3], torch.tensor(2.0 / 10000 ** (2 / E)).cos())
    with pytest.raises(ValueError, match="max_length must be positive"):
        nn.TransformerEncoder(layer, 1, positions="learned")
    with pytest.raises(ValueError, match="positions must be"):
        nn.TransformerEncoder(layer, 1, positions="other")


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="d_model must be a positive multiple of nhead = 4, got 10"
    ):
        nn.TransformerEncoderLayer(10, 4)
    with pytest.raises(ValueError, match="activation must be a callable or one of"):
        nn.TransformerEncoderLayer(E, H, activation="nonsense")
    with pytest.raises(ValueError, match='norm must be "layer" or "rms"'):
        nn.TransformerEncoderLayer(E, H, norm="batch")


def test_nested_input_takes_torchs_path(copies):
    mine, theirs = stack(copies, batch_first=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
        out, want = mine.eval()(x), theirs.eval()(x)
        torch.testing.assert_close(out.to_padded_tensor(0.0), want.to_padded_tensor(0.0))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    seq=st.integers(1, 8),
    batch_first=st.booleans(),
    norm_first=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(["relu", "gelu"]),
    masked=st.booleans(),
    padded=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_options(
    batch, seq, batch_first, norm_first, bias, activation, masked, padded, training, seed
):
    torch.manual_seed(seed)
    options = {
        "batch_first": batch_first,
        "norm_first": norm_first,
        "bias": bias,
        "activation": activation,
    }
    mine = _stack(nn.TransformerEncoderLayer, nn.TransformerEncoder, 2, True, True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _stack(
            torch_nn.TransformerEncoderLayer, torch_nn.TransformerEncoder, 2, True, True, **options
        )
    theirs.load_state_dict(mine.state_dict())
    mine.train(training)
    hidden = padding(torch.randint(1, seq + 1, (batch,)).tolist(), seq) if padded else None
    x = torch.randn(batch, seq, E) if batch_first else torch.randn(seq, batch, E)
    call = {"mask": causal_mask(seq) if masked else None, "src_key_padding_mask": hidden}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = theirs(x, **call)
    out = mine(x, **call)
    if hidden is not None:
        hidden = (hidden if batch_first else hidden.T)[..., None]
        out, want = out.masked_fill(hidden, 0.0), want.masked_fill(hidden, 0.0)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5, E), (2, 0, E)], ids=["batch", "seq"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_empty_inputs(copies, shape, norm_first):
    mine, _ = stack(copies, batch_first=True, norm_first=norm_first)
    x = torch.randn(shape, requires_grad=True)
    out = mine(x, src_key_padding_mask=torch.zeros(shape[:2], dtype=torch.bool))
    assert out.shape == shape
    out.sum().backward()


def test_checkpointing_draws_the_same_dropout(copies):
    mine, _ = stack(copies)
    for module in mine.modules():
        if isinstance(module, torch_nn.Dropout):
            module.p = 0.3
    gradients = []
    for run in (mine, functools.partial(checkpoint, mine, use_reentrant=False)):
        x = torch.ones(5, 2, E, requires_grad=True)
        torch.manual_seed(1)
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_inference_mode(copies):
    mine, _ = stack(copies, batch_first=True)
    x = torch.randn(2, 5, E)
    want = mine(x, src_key_padding_mask=padding([5, 2], 5))
    with torch.inference_mode():
        out = mine(x, src_key_padding_mask=padding([5, 2], 5))
    torch.testing.assert_close(out, want)
