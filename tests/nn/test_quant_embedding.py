"""QuantEmbedding as a module, quantize_ with embeddings, ties, and checkpoints of them."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmos_fast.checkpoints.storage import read_tensors, write_tensors
from llmos_fast.data import Vocabulary
from llmos_fast.models import Quantization, TransformerModel
from llmos_fast.nn import (
    QuantEmbedding,
    QuantLinear,
    dequantize_,
    empty_quantized_,
    quantize_,
)
from llmos_fast.quantize import SCHEMES, quantize
from llmos_fast.training import Checkpoint

ROWS = 37  # the last panel holds 5


def embedding(columns=64, **options):
    torch.manual_seed(0)
    return nn.Embedding(ROWS, columns, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("columns", [1, 30, 64, 70, 96])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_those_of_the_dequantized_table(scheme, columns, dtype):
    module = QuantEmbedding.from_float(embedding(columns).to(dtype), scheme, 32)
    ids = torch.tensor([[0, 36, 15], [16, 0, 31]])
    rows = module(ids)
    assert rows.dtype == module.dtype == dtype
    assert torch.equal(rows, module.qweight.dequantize(dtype)[ids])
    assert f"{ROWS}, {columns}" in repr(module)
    assert f"scheme={scheme}" in repr(module)


def test_every_id_and_integer_dtype():
    original = embedding(48, padding_idx=3)
    module = QuantEmbedding.from_float(original, "int4_asym", 32, "absmax")
    table = quantize(original.weight, "int4_asym", 32, "absmax").dequantize()
    assert torch.equal(module(torch.arange(ROWS)), table)
    assert torch.equal(module(torch.arange(ROWS, dtype=torch.int32).flip(0)), table.flip(0))
    columns = torch.arange(36).view(4, 9).T
    assert torch.equal(module(columns), table[columns])
    assert torch.equal(module(torch.tensor(7)), table[7])
    assert module(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 48)
    assert "padding_idx=3" in repr(module)
    assert module.dequantize().padding_idx == 3


@pytest.mark.parametrize(("ids", "got"), [([0, ROWS], ROWS), ([-1, 2], -1), ([47], 47), ([48], 48)])
def test_ids_out_of_range(ids, got):
    module = QuantEmbedding(ROWS, 64)
    with pytest.raises(IndexError, match=rf"ids must be in \[0, 37\), got {got}"):
        module(torch.tensor(ids))


def test_other_dtypes_of_ids():
    for dtype in (torch.float32, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match="quant_embedding: ids must be int32 or int64, got"):
            QuantEmbedding(ROWS, 64)(torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_what_a_frozen_table_cannot_do(option):
    original = embedding(**option)
    (name,) = option
    with pytest.raises(ValueError, match=f"QuantEmbedding: embedding must not have {name}"):
        QuantEmbedding.from_float(original, "int8")
    report = quantize_(nn.Sequential(original), embeddings=True)
    value = option[name]
    note = f"0 is left as it is: its replacement must not have {name}, got {value}"
    assert report.notes == [note]


def test_casts_move_the_result_and_not_the_scales():
    module = QuantEmbedding.from_float(embedding(), "int4", 32)
    scales = module.scales.clone()
    ids = torch.arange(5)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        module.to(dtype)
        assert torch.equal(module.scales, scales)
        assert module.scales.dtype == torch.bfloat16
        assert torch.equal(module(ids), module.qweight.dequantize(dtype)[ids])
    assert module.dequantize().weight.dtype == torch.float16
    assert module.dequantize(torch.float32).weight.dtype == torch.float32


@pytest.mark.parametrize("scheme", ["int8", "int4_asym", "nf4_a16", "fp8"])
def test_state_dict_through_safetensors(scheme, tmp_path):
    saved = QuantEmbedding.from_float(embedding(), scheme, 32)
    save_file(saved.state_dict(), tmp_path / "table.safetensors")
    loaded = QuantEmbedding(ROWS, 64, scheme=scheme, group_size=32)
    loaded.load_state_dict(load_file(tmp_path / "table.safetensors"))
    ids = torch.arange(ROWS)
    for other in (loaded, copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        assert torch.equal(other(ids), saved(ids))
    assert not list(saved.parameters())


def test_damaged_state_dicts_are_refused():
    state = QuantEmbedding.from_float(embedding(), "int4", 32).state_dict()
    with pytest.raises(ValueError, match="QuantEmbedding: state_dict must hold nf4, got int4"):
        QuantEmbedding(ROWS, 64, scheme="nf4", group_size=32).load_state_dict(state)
    state["scales"][0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="scales must be finite, got 1"):
        QuantEmbedding(ROWS, 64, scheme="int4", group_size=32).load_state_dict(state)


def test_compiles_as_one_graph():
    module = QuantEmbedding.from_float(embedding(), "int4", 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[1, 36]])
    assert torch.equal(compiled(ids), module(ids))
    with pytest.raises(IndexError, match=r"ids must be in \[0, 37\)"):
        compiled(torch.tensor([[1, 37]]))


class Tied(nn.Module):
    """A language model of two layers whose projection has the embedding's weight."""

    def __init__(self, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(ROWS, 64)
        self.inner = nn.Linear(64, 64)
        self.head = nn.Linear(64, ROWS, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embedding(ids))))


def share(net):
    names = ("packed", "scales", "zero_points")
    pairs = [(getattr(net.embedding, n), getattr(net.head, n)) for n in names]
    return all(a is b for a, b in pairs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int4_asym", "nf4"])
def test_tied_weights_stay_one(scheme, bias, tmp_path):
    net = Tied(bias)
    ids = torch.arange(ROWS)
    before = net(ids)
    report = quantize_(net, scheme, 32, embeddings=True)
    assert report.notes == []
    assert [layer.name for layer in report.layers] == ["inner", "head"]
    assert isinstance(net.embedding, QuantEmbedding)
    assert isinstance(net.head, QuantLinear)
    assert share(net)
    after = net(ids)
    assert 0 < (after - before).norm() < 0.3 * before.norm()
    held = net.inner.qweight.nbytes + net.head.qweight.nbytes + 4 * 64 + 4 * ROWS * bias
    assert report.bytes_after == held

    state = net.state_dict()
    assert {"embedding.packed", "head.packed"} <= state.keys()
    write_tensors(tmp_path / "m", state)
    assert (tmp_path / "m").stat().st_size < held + 2000
    skeleton = Tied(bias)
    empty_quantized_(skeleton, scheme, 32, embeddings=True)
    assert share(skeleton)
    skeleton.load_state_dict(read_tensors(tmp_path / "m"))
    for other in (skeleton, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert share(other)
        assert torch.equal(other(ids), after)
        other.head.scales.zero_()
        assert not other.embedding.scales.any()


@pytest.mark.parametrize("names", [("embedding", "head"), ("head", "embedding")])
def test_ties_survive_casts_and_moves(names):
    tied = Tied()
    net = nn.Module()
    for name in names:
        net.add_module(name, getattr(tied, name))
    quantize_(net, "int4", 32, embeddings=True)
    assert share(net.bfloat16())
    assert net.embedding(torch.arange(3)).dtype == torch.bfloat16
    assert share(net.to("meta"))
    assert net.head.packed.is_meta


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize_ties_again(dtype):
    net = Tied(bias=True).train()
    quantize_(net, "int4", 32, embeddings=True)
    table = net.embedding.qweight.dequantize(dtype or torch.float32)
    dequantize_(net, dtype)
    assert type(net.embedding) is nn.Embedding
    assert type(net.head) is nn.Linear
    assert net.head.weight is net.embedding.weight
    assert torch.equal(net.head.weight, table)
    assert net.embedding.training


def test_two_embeddings_and_a_projection_of_one_weight():
    net = nn.ModuleDict(
        {"a": nn.Embedding(9, 32), "b": nn.Embedding(9, 32), "c": nn.Linear(32, 9, bias=False)}
    )
    net["b"].weight = net["c"].weight = net["a"].weight
    assert len(quantize_(net, embeddings=True).layers) == 1
    net.to("meta")
    assert net["a"].packed is net["b"].packed is net["c"].packed
    dequantize_(net)
    assert net["a"].weight is net["b"].weight is net["c"].weight


def test_a_module_used_twice_stays_one():
    shared = nn.Embedding(9, 32)
    net = nn.ModuleDict({"encoder": shared, "decoder": shared})
    assert len(quantize_(net, embeddings=True).layers) == 1
    assert net["encoder"] is net["decoder"]
    dequantize_(net)
    assert net["encoder"] is net["decoder"]


@pytest.mark.parametrize(
    ("skip", "note"),
    [
        (["head"], "embedding was tied to head.weight, which stays float"),
        (["embedding"], "head was tied to embedding.weight, which stays float"),
    ],
)
def test_half_a_tie_can_stay(skip, note):
    net = Tied()
    weight = net.head.weight
    report = quantize_(net, skip=skip, embeddings=True)
    assert note in report.notes
    assert f"{skip[0]} is left as it is: named in skip" in report.notes
    assert getattr(net, skip[0]).weight is weight


def test_without_the_option_embeddings_stay():
    net = Tied()
    report = quantize_(net)
    assert type(net.embedding) is nn.Embedding
    assert report.notes == ["head was tied to embedding.weight, which stays float"]


def test_gptq_rounds_the_shared_weight_for_the_projection():
    net = Tied()
    data = [torch.arange(ROWS)]
    report = quantize_(net, "int4_a16", 32, calibration=data, bits=6.0, embeddings=True)
    assert report.notes == []
    assert share(net)
    assert net(data[0]).isfinite().all()


def test_subclasses_and_bare_embeddings():
    class Special(nn.Embedding):
        pass

    report = quantize_(nn.Sequential(Special(4, 32)), embeddings=True)
    assert report.notes == ["0 is left as it is: Special may do more than nn.Embedding"]
    with pytest.raises(ValueError, match="quantize_: model must contain its embeddings"):
        quantize_(nn.Embedding(4, 32), embeddings=True)
    with pytest.raises(ValueError, match="must contain its layers, got a QuantEmbedding"):
        dequantize_(QuantEmbedding(4, 32))


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoint(tmp_path, tied):
    tokenizer = Vocabulary(["<unk>", "<eos>", *"abcdefgh"])
    model = TransformerModel(len(tokenizer), 32, 2, 32, 1).eval()
    if tied:
        model.decoder.weight = model.input_emb.weight
    quantize_(model, "int4", 32, embeddings=True)
    record = Quantization("int4", 32, {}, embeddings=True)
    saved = Checkpoint(model, tokenizer, "text.txt", 7, record)
    saved.save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    assert loaded.quantization == record
    assert isinstance(loaded.model.input_emb, QuantEmbedding)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded.model(tokens), model(tokens))
    with pytest.raises(ValueError, match="embeddings must be a bool, got 1"):
        Quantization("int4", 32, {}, embeddings=1)


def test_tied_float_weights_are_written_once(tmp_path):
    net = Tied()
    write_tensors(tmp_path / "m", net.state_dict())
    parameters = 4 * (ROWS * 64 + 64 * 64 + 64)
    assert (tmp_path / "m").stat().st_size < parameters + 1000
    state = read_tensors(tmp_path / "m")
    assert torch.equal(state["head.weight"], net.embedding.weight)
    other = Tied()
    other.load_state_dict(state)
    assert other.head.weight is other.embedding.weight
