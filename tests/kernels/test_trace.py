"""What a training step launches beside our kernels: the list is exact, and each entry has a reason.

The step runs on CPU tensors, the way that it goes on a GPU: the compiled CPU kernels are taken
away, and launches are noted down instead of run, so that the numbers mean nothing. torch's profiler
tells every operator that torch itself executed.
"""

from collections import Counter

import pytest
import torch
from llmos_fast.kernels import runtime

from llmos_fast import dispatch
from llmos_fast.models import TransformerModel
from llmos_fast.nn import TransformerEncoder, TransformerEncoderLayer

BATCH, SEQ, WIDTH, HIDDEN, LAYERS, TOKENS = 4, 32, 64, 128, 2, 1000
# what reads and writes whole tensors without multiplying matrices
MOVES = {
    "add", "add_", "sub", "mul", "mul_", "div", "div_", "neg", "exp", "tanh", "pow", "rsqrt",
    "gelu", "relu", "silu", "gelu_backward", "threshold_backward", "silu_backward", "sigmoid",
    "dropout", "native_dropout", "native_dropout_backward", "bernoulli_", "layer_norm",
    "native_layer_norm", "native_layer_norm_backward", "rms_norm", "_fused_rms_norm", "_softmax",
    "_softmax_backward_data", "_log_softmax", "nll_loss_forward", "where", "masked_fill",
    "masked_fill_", "clone", "cat", "stack", "zero_", "fill_", "_to_copy", "copy_",
}  # fmt: skip
EMBEDDING = {"mul": 2, "add": 1}  # scaled, its gradient scaled, positions added
PACKED = {"cat": LAYERS}  # gradients of query, key and value, which are parts of one projection


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that would have been launched on a Hopper GPU."""
    names = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def note(kernel, grid, **arguments):
        names.append(kernel.__name__)

    for op, known in dispatch.registered().items():
        left = tuple(i for i in known if i.name != "native")
        monkeypatch.setitem(dispatch._REGISTRY, op, left)
    monkeypatch.setattr(runtime, "offline", runtime.Offline(90, note))
    return names


def moves(step):
    """Operators of MOVES that ``step`` executed on as many elements as one hidden state has."""
    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profile:
        step()
    found = Counter()
    for event in profile.events():
        name = event.name.removeprefix("aten::")
        parent = event.cpu_parent.name if event.cpu_parent else ""
        sizes = [torch.Size(s).numel() for s in event.input_shapes if s]
        large = name == "cat" or max(sizes, default=0) >= BATCH * SEQ * WIDTH  # a list has no shape
        inside = parent in (
            "aten::addmm",
            "aten::embedding_dense_backward",
            "aten::zeros",
            "aten::zero_",
        )
        if name in MOVES and not inside and large:
            if parent.removeprefix("aten::") in ("clone", "_to_copy"):
                continue  # counted as its parent
            found[name] += 1
    return found


def training_step(model, loss, autocast):
    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()

    return step


def test_the_language_model(launched):
    model = TransformerModel(TOKENS, WIDTH, 4, HIDDEN, LAYERS, 0.1)
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    found = moves(training_step(model, lambda: model.loss(tokens, tokens), False))
    # autograd adds up what reaches a norm through the next sub-layer and through its residual
    accumulated = {"add_": 2 * LAYERS}
    assert found == EMBEDDING | PACKED | accumulated
    for kernel in ("attention_forward", "attention_backward_key", "product_tiles",
                   "ffn_backward_tiles", "add_norm_forward", "add_norm_backward",
                   "dropout"):  # fmt: skip
        assert launched.count(kernel) > 0, kernel


def test_under_autocast_only_its_own_casts_are_added(launched):
    model = TransformerModel(TOKENS, WIDTH, 4, HIDDEN, LAYERS, 0.1)
    tokens = torch.zeros(BATCH, SEQ, dtype=torch.int64)
    found = moves(training_step(model, lambda: model.loss(tokens, tokens), True))
    casts = found.pop("_to_copy")
    # parameters of at least a hidden state's size, and the input of each group of products: both
    # ways
    assert casts <= 2 * (2 + 2 * LAYERS + 4 * LAYERS)
    assert found == EMBEDDING | PACKED | {"add_": 2 * LAYERS}


def test_gated_layers_that_normalise_first(launched):
    layer = TransformerEncoderLayer(
        WIDTH, 4, HIDDEN, 0.1, activation="swiglu", norm_first=True, batch_first=True
    )
    encoder = TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    x = torch.randn(BATCH, SEQ, WIDTH, requires_grad=True)
    direction = torch.ones(BATCH, SEQ, WIDTH)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(SEQ)

    def step():
        encoder.zero_grad()
        out = encoder(x, mask=mask, is_causal=True)
        torch.autograd.grad(out, [x, *encoder.parameters()], direction)

    # a layer's first norm and its first residual read one tensor
    assert moves(step) == PACKED | {"add_": LAYERS}
