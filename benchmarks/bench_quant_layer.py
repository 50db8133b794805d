"""A decoder layer with quantized weights, one new token per sequence, and what is not products.

A run goes through several layers in turn, which together are larger than the caches, so that
weights and the keys and values of earlier tokens come from memory as they do when a model generates
text. Ours is captured, and its cache of keys and values is int8; ``fp32_cache`` and ``eager`` are
what it takes otherwise. ``products`` is the same quant_matmul calls alone, captured too; the share
of the layer's time that they do not take is ``overhead`` in ``extra_info``, and the machine's limit
is theirs. Peers are torch's own layer of the same sizes, in bf16 and with torch.ao's dynamically
quantized products.

    pytest benchmarks/bench_quant_layer.py --benchmark-only
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast import capture, ops, quantize, use
from llmos_fast.quantize import interleave
from llmos_fast.testing import random

from .quant_peers import TOUCHED

CONTEXT = 256
HEAD_DIM = 64


class Shape(NamedTuple):
    """``gated``: RMSNorm, rotary positions and SwiGLU; else LayerNorm, GELU and biases."""

    width: int
    heads: int
    kv_heads: int
    ffn: int
    gated: bool

    @property
    def qkv(self):
        return (self.heads + 2 * self.kv_heads) * HEAD_DIM

    @property
    def products(self):
        """(out_features, in_features)."""
        inner = self.ffn * (2 if self.gated else 1)
        width = self.width
        return [(self.qkv, width), (width, width), (inner, width), (width, self.ffn)]

    @property
    def weights(self):
        return sum(n * k for n, k in self.products)


SMALLEST = "small"
SHAPES = {
    SMALLEST: Shape(128, 2, 1, 256, True),
    "llama-1.1b": Shape(2048, 32, 4, 5632, True),
    "gpt2-124m": Shape(768, 12, 12, 3072, False),
}
SCHEMES = {"int4-g32": ("int4", 32), "int4-g128": ("int4", 128), "int8": ("int8", 128)}


class Layer(NamedTuple):
    """``linears``: (weight, bias) of qkv, attention output, and both of the feed-forward network;
    ``norms``: likewise, before attention and feed-forward network.
    """

    linears: list[tuple[Any, Tensor | None]]
    norms: list[tuple[Tensor, Tensor | None]]
    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def cache(self):
        return {
            "key_cache": self.keys,
            "value_cache": self.values,
            "key_scale": self.key_scale,
            "value_scale": self.value_scale,
        }


def float_layer(shape, batch, dtype=torch.float32):
    biased = not shape.gated

    def vector(size):
        return random(size, scale=0.1).to(dtype) if biased else None

    cache = (batch, shape.kv_heads, CONTEXT, HEAD_DIM)
    return Layer(
        [(random(n, k, scale=0.02).to(dtype), vector(n)) for n, k in shape.products],
        [(1 + random(shape.width, scale=0.1).to(dtype), vector(shape.width)) for _ in range(2)],
        random(*cache).to(dtype),
        random(*cache).to(dtype),
    )


def clone(layer):
    """Copies of what is read from memory; a packed weight of torch.ao has no copy."""

    def of(weight):
        if isinstance(weight, Tensor):
            return weight.clone()
        parts = {name: tensor.clone() for name, tensor in weight.tensors().items()}
        return weight.__class__(**{**vars(weight), **parts})

    linears = [(of(weight), bias) for weight, bias in layer.linears]
    return Layer(linears, layer.norms, *(None if t is None else t.clone() for t in layer[2:]))


def with_int8_cache(layer):
    """The layer with the same keys and values in int8."""
    scales = [t.abs().amax(-1) / 127 for t in (layer.keys, layer.values)]
    keys, values = (
        (t / scale[..., None]).round().char()
        for t, scale in zip((layer.keys, layer.values), scales, strict=True)
    )
    return Layer(layer.linears, layer.norms, keys, values, *scales)


def quantized_layer(layer, shape, scheme, group):
    linears = []
    for i, (weight, bias) in enumerate(layer.linears):
        if shape.gated and i == 2:
            parts = [quantize(half, scheme, group, "absmax") for half in weight.chunk(2)]
            linears.append((interleave(*parts), bias))
        else:
            linears.append((quantize(weight, scheme, group, "absmax"), bias))
    return layer._replace(linears=linears)


def angles():
    frequency = 10000 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turn = (CONTEXT - 1) * frequency[None]
    return turn.cos(), turn.sin()


def ours(x, layer, shape, lengths, cos, sin):
    """Float[batch width] -> Float[batch width]."""
    kind = "rms" if shape.gated else "layer"
    (qkv, qkv_bias), (out, out_bias), (up, up_bias), (down, down_bias) = layer.linears
    normed, _ = ops.add_norm(x, None, *layer.norms[0], kind=kind)
    heads = ops.quant_matmul(normed, qkv, qkv_bias).view(len(x), -1, 1, HEAD_DIM)
    q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
    if shape.gated:
        q, k = ops.rotary(q, k, cos, sin)
    ops.cache_write(k, v, cache_lengths=lengths, **layer.cache)
    attended = ops.attention_decode(q, cache_lengths=lengths, **layer.cache).reshape(len(x), -1)
    x = ops.quant_matmul(attended, out, out_bias, residual=x)
    normed, _ = ops.add_norm(x, None, *layer.norms[1], kind=kind)
    activation = "silu" if shape.gated else "gelu"
    inner = ops.quant_matmul(normed, up, up_bias, activation=activation, gated=shape.gated)
    return ops.quant_matmul(inner, down, down_bias, residual=x)


def products(layer, shape, x, attended, inner):
    """The products of ``ours`` alone."""
    (qkv, qkv_bias), (out, out_bias), (up, up_bias), (down, down_bias) = layer.linears
    ops.quant_matmul(x, qkv, qkv_bias)
    ops.quant_matmul(attended, out, out_bias, residual=x)
    activation = "silu" if shape.gated else "gelu"
    ops.quant_matmul(x, up, up_bias, activation=activation, gated=shape.gated)
    ops.quant_matmul(inner, down, down_bias, residual=x)


def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def torchs(x, layer, shape, cos, sin, linear):
    """The same layer by torch; ``linear(x, weight, bias)`` is its product."""

    def norm(x, weight, bias):
        if shape.gated:
            return F.rms_norm(x, (shape.width,), weight, 1e-5)
        return F.layer_norm(x, (shape.width,), weight, bias)

    qkv, out, up, down = layer.linears
    heads = linear(norm(x, *layer.norms[0]), *qkv).view(len(x), -1, 1, HEAD_DIM)
    q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
    if shape.gated:
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    layer.keys[:, :, -1:], layer.values[:, :, -1:] = k, v
    grouped = shape.heads != shape.kv_heads
    attended = F.scaled_dot_product_attention(q, layer.keys, layer.values, enable_gqa=grouped)
    x = x + linear(attended.reshape(len(x), -1), *out)
    inner = linear(norm(x, *layer.norms[1]), *up)
    if shape.gated:
        gate, inner = inner.chunk(2, -1)
        inner = F.silu(gate) * inner
    else:
        inner = F.gelu(inner)
    return x + linear(inner, *down)


def pack_dynamic(weight, bias):
    torch.backends.quantized.engine = "onednn"
    scales = weight.abs().amax(1).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    integers = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
    return torch.ops.quantized.linear_prepack(integers, bias), None


def linear_dynamic(x, packed, _):
    return torch.ops.quantized.linear_dynamic(x, packed)


def in_turn(layers, call, x):
    def run():
        hidden = x
        for layer in layers:
            hidden = call(hidden, layer)
        return hidden

    return run


@pytest.mark.filterwarnings("ignore")  # torch's quantized tensors warn about themselves
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def bench_quant_layer(benchmark, compare, smoke, name, scheme, batch):
    if smoke != (name == SMALLEST):
        pytest.skip("the small layer is for smoke runs, and they are for it")
    shape = SHAPES[name]
    count = {
        bits: 1 if smoke else math.ceil(8 * TOUCHED / (bits * shape.weights)) for bits in (4, 8, 16)
    }
    first = float_layer(shape, batch)
    x = random(batch, shape.width)
    cos, sin = angles()

    lengths = torch.full((batch,), CONTEXT)

    def step(layers):
        return in_turn(layers, lambda x, layer: ours(x, layer, shape, lengths, cos, sin), x)

    narrow = with_int8_cache(quantized_layer(first, shape, *SCHEMES[scheme]))
    layers = [narrow]
    layers += [clone(narrow) for _ in range(1, count[4 if scheme.startswith("int4") else 8])]
    # the same weights with other caches
    wide = [clone(first)._replace(linears=layer.linears) for layer in layers]
    inputs = (x, random(batch, shape.width), random(batch, shape.ffn))
    every_product = capture(lambda: [products(layer, shape, *inputs) for layer in layers] and None)
    runs = {"ours": capture(step(layers)).replay, "products": every_product.replay}
    runs |= {"fp32_cache": capture(step(wide)).replay, "eager": step(layers)}

    half = float_layer(shape, batch, torch.bfloat16)
    halves = [half, *(clone(half) for _ in range(1, count[16]))]
    tables = cos.bfloat16(), sin.bfloat16()
    runs["torch_bf16"] = in_turn(
        halves, lambda x, layer: torchs(x, layer, shape, *tables, F.linear), x.bfloat16()
    )
    dynamic = [
        Layer([pack_dynamic(*pair) for pair in first.linears], first.norms, *caches)
        for caches in [(first.keys.clone(), first.values.clone()) for _ in range(count[8])]
    ]
    runs["torch_dynamic"] = in_turn(
        dynamic, lambda x, layer: torchs(x, layer, shape, cos, sin, linear_dynamic), x
    )

    def check():
        """Rounding x to int8 may go either way where two products' sums differ by a bit."""
        out = ours(x, narrow, shape, lengths, cos, sin)
        with use("reference"):
            expected = ours(x, narrow, shape, lengths, cos, sin)
        assert (out - expected).norm() < 1e-2 * (expected - x).norm()
        exact = torchs(x, first, shape, cos, sin, F.linear)
        assert (out - exact).norm() < 0.25 * (exact - x).norm()

    calls = dict.fromkeys(("ours", "products", "fp32_cache", "eager"), len(layers))
    calls |= {"torch_bf16": len(halves), "torch_dynamic": len(dynamic)}
    compare(
        runs["ours"],
        {peer: runs[peer] for peer in ("torch_bf16", "torch_dynamic")},
        baselines={name: runs[name] for name in ("products", "fp32_cache", "eager")},
        check=check,
        flops=2 * batch * shape.weights,
        bytes=sum(weight.nbytes for weight, _ in narrow.linears),
        dtype=torch.int8,
        rounds=20,
        calls=calls,
    )
    if benchmark.enabled:
        alone = 1e-3 * benchmark.extra_info["baselines_ms"]["products"]
        benchmark.extra_info["overhead"] = 1 - alone / benchmark.stats.stats.median
        benchmark.extra_info["cache_bytes"] = sum(t.nbytes for t in narrow[2:])
