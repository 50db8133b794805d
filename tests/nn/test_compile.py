import warnings

import pytest
import torch
from torch import nn as torch_nn

from llmos_fast import nn

E, H, FF = 16, 4, 24


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch.export and the compiler use names that they themselves deprecate
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def padding(lengths, seq):
    return torch.arange(seq) >= torch.tensor(lengths)[:, None]


MODELS = {
    "post": {},
    "pre": {"norm_first": True, "batch_first": True},
    "beyond": {"norm": "rms", "rotary": True, "num_kv_heads": 2, "activation": "swiglu"},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_as_one_graph(options, training):
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 1, 1, FF, 0.0, **options).train(training)
    shape = (2, 5, E) if options.get("batch_first") else (5, 2, E)
    src, tgt = torch.randn(shape), torch.randn(shape)
    hidden = padding([5, 3], 5)
    call = {
        "tgt_mask": torch_nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": hidden,
        "memory_key_padding_mask": hidden,
    }
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, want = compiled(src, tgt, **call), model(src, tgt, **call)
    assert torch.equal(out, want)
    weight = model.encoder.layers[0].linear1.weight
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    (wanted,) = torch.autograd.grad(want.square().sum(), weight)
    assert torch.equal(gradient, wanted)


def test_padding_semantics_do_not_depend_on_the_compiler():
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    hidden, x = padding([5, 2], 5), torch.randn(2, 5, E)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(out, model(x, src_key_padding_mask=hidden))
    assert not out[hidden].any()


@torch.no_grad()
def test_decoding_compiles():
    layer = nn.TransformerEncoderLayer(E, H, FF, 0.0, rotary=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, cache = torch.randn(6, 2, E), model.new_cache(2)
    out = torch.cat([compiled(part, cache=cache) for part in x.split([4, 1, 1])])
    torch.testing.assert_close(out, model(x, is_causal=True))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exports(strict):
    model = nn.Transformer(E, H, 1, 1, FF, 0.0, batch_first=True).eval()
    src, tgt, hidden = torch.randn(2, 5, E), torch.randn(2, 4, E), padding([5, 3], 5)
    call = {"src_key_padding_mask": hidden, "tgt_is_causal": True}
    program = torch.export.export(model, (src, tgt), call, strict=strict)
    torch.testing.assert_close(program.module()(src, tgt, **call), model(src, tgt, **call))


def test_compiled_in_place():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, FF, 0.0), 2)
    x = torch.randn(5, 2, E)
    want = model(x)
    graphs = []
    model.layers[0].compile(backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    torch.testing.assert_close(model(x), want)
    assert len(graphs) == 1
