"""Encoder inference: BERT-base's shape, 8 sequences of 128, beside torch.nn and exported models.

Ours and every peer have the same drawn weights. ``ragged`` sequences are half as long on average,
padded to 128 and masked; the machine's limit counts the arithmetic of visible positions only.
``relative_error`` in ``extra_info`` is each engine's distance from torch.nn in float64 at visible
positions, and ``sequences_per_s`` its speed. int8 rounds activations as the model runs; ours keeps
the rest in fp32, or in bf16 where it is called ``bf16_rest``.

    OMP_PROC_BIND=close OMP_PLACES=threads pytest benchmarks/bench_encoder_inference.py
"""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn

import llmos_fast
import llmos_fast.nn

from .encoder_peers import PEERS
from .quant_peers import reason


class Shape(NamedTuple):
    d_model: int
    nhead: int
    inner: int
    layers: int
    batch: int
    seq: int

    def flops(self, lengths):
        products = 4 * self.d_model**2 + 2 * self.d_model * self.inner
        tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
        return self.layers * (2 * tokens * products + 4 * pairs * self.d_model)


BERT_BASE = Shape(768, 12, 3072, 12, 8, 128)
SMALL = Shape(64, 4, 128, 2, 8, 32)
RAGGED = [1.0, 0.75, 0.625, 0.5, 0.375, 0.3125, 0.25, 0.1875]  # of the longest: half on average
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# of the outputs' norm: what rounding does over 12 layers
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.1}


@functools.cache
def torch_encoder(shape):
    """Every layer has weights of its own: engines keep equal constants once."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        shape.d_model, shape.nhead, shape.inner, activation="gelu", batch_first=True
    )
    encoder = nn.TransformerEncoder(layer, shape.layers)
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return encoder.eval()


def our_model(encoder, dtype, scheme=None):
    model = copy.deepcopy(encoder).to(dtype)
    llmos_fast.accelerate(model)
    if scheme is not None:
        llmos_fast.quantize_(model, scheme)
    return model


def our_runs(encoder, precision, x, visible):
    """By name, "ours" first."""
    if precision == "int8":
        kinds = {"ours": (torch.float32, "int8"), "bf16_rest": (torch.bfloat16, "int8")}
    else:
        kinds = {"ours": (DTYPES[precision], None)}
    hidden = None if visible is None else ~visible

    def make(dtype, scheme):
        model, narrow = our_model(encoder, dtype, scheme), x.to(dtype)

        @torch.no_grad()
        def run():
            return model(narrow, src_key_padding_mask=hidden)

        return run

    return {name: make(*kind) for name, kind in kinds.items()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", ["full", "ragged"])
@pytest.mark.parametrize("precision", DTYPES)
def bench_encoder_inference(benchmark, compare, smoke, precision, padding):
    shape = SMALL if smoke else BERT_BASE
    encoder = torch_encoder(shape)
    x = torch.randn(shape.batch, shape.seq, shape.d_model)
    lengths, visible = [shape.seq] * shape.batch, None
    if padding == "ragged":
        lengths = [int(shape.seq * share) for share in RAGGED]
        visible = torch.arange(shape.seq) < torch.tensor(lengths)[:, None]

    ours = our_runs(encoder, precision, x, visible)
    peers, left_out = {}, {}
    for name, make in PEERS[precision].items():
        try:
            peers[name] = make(encoder, x, visible)
        except Exception as error:
            left_out[name] = reason(error)

    runs, errors = ours | peers, {}

    def check():
        wide = copy.deepcopy(encoder).double()
        with torch.no_grad():
            hidden = None if visible is None else ~visible
            truth = wide(x.double(), src_key_padding_mask=hidden)
        seen = slice(None) if visible is None else visible
        for name, run in runs.items():
            difference = (run().double() - truth)[seen].norm() / truth[seen].norm()
            errors[name] = difference.item()
            assert errors[name] < LARGEST_ERROR[precision], f"{name}: {errors[name]:.1e}"

    compare(
        runs["ours"],
        peers,
        check=check,
        flops=shape.flops(lengths),
        dtype=DTYPES[precision],
        rounds=5,
        baselines={name: run for name, run in ours.items() if name != "ours"},
        calls=dict.fromkeys(runs, 1),
    )
    info = benchmark.extra_info
    info.update(relative_error=errors, left_out=left_out)
    if benchmark.enabled:
        times = {"ours": 1e3 * benchmark.stats.stats.median} | info["peers_ms"]
        times |= info.get("baselines_ms", {})
        info["sequences_per_s"] = {n: 1e3 * shape.batch / ms for n, ms in times.items()}
