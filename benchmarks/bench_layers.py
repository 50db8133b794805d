"""The drop-in layers beside torch.nn: training steps, evaluation, padding, peak memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmos_fast.nn
from llmos_fast.testing import assert_close_to_truth

from .memory_training import compare_peaks

# d_model, nhead, layers, seq, batch
TRAINING = [
    (128, 4, 2, 32, 4),
    (128, 4, 2, 1024, 2),
    (256, 4, 4, 64, 8),
    (256, 4, 4, 512, 4),
    (512, 8, 2, 128, 8),
    (1024, 16, 2, 256, 2),
    (768, 12, 6, 256, 4),
]
VOCABULARY = 1000


class EncoderLM(nn.Module):
    """Embedding, causal encoder stack, projection; the stack from ``library``."""

    def __init__(self, library, d_model, nhead, layers, dropout):
        super().__init__()
        layer = library.TransformerEncoderLayer(
            d_model, nhead, 4 * d_model, dropout, activation="gelu", batch_first=True
        )
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.stack = library.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.projection = nn.Linear(d_model, VOCABULARY)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.projection(self.stack(self.embedding(tokens), mask=mask, is_causal=True))


def training_step(library, shape, dropout, autocast):
    """A function that makes one step (forward, backward, AdamW) and returns its loss."""
    d_model, nhead, layers, seq, batch = shape
    torch.manual_seed(0)
    model = EncoderLM(library, d_model, nhead, layers, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, VOCABULARY, (batch, seq + 1))

    def run():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def step_flops(shape):
    """Products of one step: 6 per parameter and token, and the attention's."""
    d_model, _, layers, seq, batch = shape
    weights = layers * 12 * d_model * d_model + VOCABULARY * d_model
    return 6 * batch * seq * weights + layers * 6 * batch * seq * seq * d_model


def check_same_losses(shape):
    """Without dropout both libraries follow one loss curve: 5 steps, small, in fp32."""
    d_model, nhead, _, seq, _ = shape
    small = (min(d_model, 128), min(nhead, 4), 1, min(seq, 32), 2)
    ours, theirs = (training_step(lib, small, 0.0, False) for lib in (llmos_fast.nn, nn))
    for _ in range(5):
        torch.testing.assert_close(ours(), theirs())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("shape", TRAINING, ids=str)
def bench_training_step(compare, smoke, shape, dropout, precision):
    if smoke and shape != TRAINING[0]:
        pytest.skip("not in a smoke run")
    autocast = precision == "bf16"
    compare(
        training_step(llmos_fast.nn, shape, dropout, autocast),
        {"torch.nn": training_step(nn, shape, dropout, autocast)},
        check=lambda: check_same_losses(shape),
        flops=step_flops(shape),
        dtype=torch.bfloat16 if autocast else torch.float32,
        rounds=7 if shape[0] * shape[3] >= 2**17 else 25,
    )


# d_model, nhead, layers, seq, batch
EVALUATION = [(128, 4, 2, 32, 4), (256, 4, 4, 128, 8), (512, 8, 2, 512, 2), (768, 12, 2, 256, 8)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [0.0, 0.4])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("shape", EVALUATION, ids=str)
def bench_encoder(compare, smoke, shape, mode, padding):
    """Forward passes, ``padding`` of the positions hidden; in eval torch.nn has a fast path."""
    if smoke and shape != EVALUATION[0]:
        pytest.skip("not in a smoke run")
    d_model, nhead, layers, seq, batch = shape
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(d_model, nhead, 4 * d_model, 0.1, batch_first=True)
    theirs = nn.TransformerEncoder(layer, layers)
    ours_layer = llmos_fast.nn.TransformerEncoderLayer(
        d_model, nhead, 4 * d_model, 0.1, batch_first=True
    )
    ours = llmos_fast.nn.TransformerEncoder(ours_layer, layers)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, seq, d_model)
    mask = None
    if padding:
        lengths = torch.linspace(1 - 2 * padding, 1, batch).mul(seq).long().clamp(1, seq)
        mask = torch.arange(seq) >= lengths[:, None]

    def check():
        outputs = []
        for model, dtype in ((ours, x.dtype), (theirs, x.dtype), (theirs, torch.float64)):
            model = model.eval().to(dtype)
            outputs.append(model(x.to(dtype), src_key_padding_mask=mask).detach())
            model.to(x.dtype)
        if mask is not None:
            outputs = [o.masked_fill(mask[..., None], 0.0) for o in outputs]
        assert_close_to_truth(*outputs, reduction=4 * d_model)

    def runner(model):
        def run():
            model.train(mode == "train")
            with torch.no_grad():
                return model(x, src_key_padding_mask=mask)

        return run

    tokens = int((~mask).sum()) if mask is not None else batch * seq
    compare(
        runner(ours),
        {"torch.nn": runner(theirs)},
        check=check,
        flops=layers * 2 * tokens * 12 * d_model * d_model,
        rounds=25,
    )


LIBRARIES = {"torch.nn": nn, "llmos_fast": llmos_fast.nn}


def named_step(library, shape):
    """For a process of its own."""
    return training_step(LIBRARIES[library], shape, 0.1, False)


@pytest.mark.parametrize("shape", [TRAINING[0], (256, 4, 4, 512, 4), (768, 12, 6, 256, 4)], ids=str)
def bench_peak_memory(benchmark, smoke, shape):
    if smoke and shape != TRAINING[0]:
        pytest.skip("not in a smoke run")
    compare_peaks(benchmark, "benchmarks.bench_layers", shape)
