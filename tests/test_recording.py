"""capture: a replay gives the bits of a call, sees changed memory, and nothing else is captured."""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import capture, native, ops, quantize
from llmos_fast.testing import random


class Block:
    """A decoder block with a cache, all of it native: quantized weights, rotary, SwiGLU."""

    def __init__(self, width=64, heads=4, kv_heads=2, capacity=32, batch=2):
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        head_dim = width // heads
        rows = (heads + 2 * kv_heads) * head_dim
        self.qkv = quantize(random(rows, width), "int8")
        self.out = quantize(random(width, width), "int4", 32)
        self.ffn = [quantize(random(128, width), "int4", 32), quantize(random(width, 128), "int8")]
        self.norm = 1 + random(width, scale=0.1)
        self.keys = torch.zeros(batch, kv_heads, capacity, head_dim)
        self.values = torch.zeros_like(self.keys)
        angle = torch.arange(capacity)[:, None] * 0.1 ** torch.linspace(0, 4, head_dim // 2)
        self.cos, self.sin = angle.cos(), angle.sin()

    def __call__(self, x, lengths, positions):
        normed, _ = ops.add_norm(x, None, self.norm, kind="rms")
        heads = ops.quant_matmul(normed, self.qkv).view(len(x), -1, 1, self.width // self.heads)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 1)
        q, k = ops.rotary(q, k, self.cos, self.sin, positions=positions)
        ops.cache_write(k, v, self.keys, self.values, lengths)
        attended = ops.attention_decode(q, self.keys, self.values, lengths).reshape(len(x), -1)
        x = ops.quant_matmul(attended, self.out, residual=x)
        normed, _ = ops.add_norm(x, None, self.norm, kind="rms")
        inner = ops.quant_matmul(normed, self.ffn[0], activation="gelu")
        return ops.quant_matmul(inner, self.ffn[1], residual=x)


def step(position):
    return random(2, 64), torch.tensor([position + 1, position]), torch.tensor([[position]] * 2)


@torch.no_grad()
def test_replays_are_the_function():
    block = Block()
    torch.manual_seed(1)
    captured = capture(block, *step(1))
    assert len(captured) == 10
    for cache in (block.keys, block.values):
        cache.zero_()
    inputs = [step(position) for position in range(1, 9)]
    replayed = [captured(*arguments).clone() for arguments in inputs]
    keys = block.keys.clone()
    for cache in (block.keys, block.values):
        cache.zero_()
    for arguments, out in zip(inputs, replayed, strict=True):
        assert torch.equal(block(*arguments), out)
    assert torch.equal(block.keys, keys)
    assert keys.any()


@torch.no_grad()
def test_inputs_can_be_written_in_place():
    block = Block()
    captured = capture(block, *step(3))
    arguments = step(5)
    for mine, new in zip(captured.inputs, arguments, strict=True):
        mine.copy_(new)
    out = captured.replay()
    assert out is captured.outputs
    assert torch.equal(out, block(*arguments))


def test_every_temporary_lives_as_long_as_the_capture():
    """Memory that the allocator took back and gave to others would change between replays."""
    weight = quantize(random(64, 64), "int8")

    def chain(x):
        for _ in range(20):
            x = ops.quant_matmul(x, weight, activation="silu")
        return x

    x = random(2, 64)
    captured = capture(chain, x)
    expected = chain(x)
    for _ in range(5):
        garbage = [torch.full((2, 64), torch.nan) for _ in range(200)]
        assert torch.equal(captured(x), expected)
    assert len(garbage) == 200


@pytest.mark.parametrize("seq_q", [1, 9])
def test_attention_is_captured_whatever_was_called_before(seq_q):
    query, key, value = random(2, 4, seq_q, 16), random(2, 2, 23, 16), random(2, 2, 23, 16)
    expected = ops.attention(query, key, value)
    native.attention._dense_sequences.cache_clear()
    native.attention_decode._full_lengths.cache_clear()
    captured = capture(ops.attention, random(2, 4, seq_q, 16), key, value)
    assert torch.equal(captured(query, key, value), expected)


def plain_step(dtype):
    """Ops between ordinary weights; queries and keys are normalised and turned where they lie."""
    norm, norm_bias, head_norm, qkv, gate, up, down = (
        random(*shape, scale=0.2).to(dtype)
        for shape in ((64,), (64,), (16,), (128, 64), (96, 64), (96, 64), (64, 96))
    )
    angles = torch.arange(9)[:, None] * 0.1 ** torch.linspace(0, 4, 8)
    cos, sin = angles.cos(), angles.sin()

    def step(x, positions):
        normed, total = ops.add_norm(x, x, norm, norm_bias)
        heads = ops.linear(normed, qkv).unflatten(-1, (8, 16)).transpose(1, 2)
        query, key, value = heads.split((4, 2, 2), 1)
        query, _ = ops.add_norm(query, None, head_norm, kind="rms")
        key, _ = ops.add_norm(key, None, head_norm, kind="rms")
        turned = ops.rotary(query, key, cos, sin, positions=positions)
        strided = ops.rotary(value, value, cos, sin, positions=positions)
        gated = ops.gated_ffn(normed, gate, up, down, b_down=norm_bias)
        plain = ops.ffn(normed, gate, None, down, norm_bias, activation="gelu")
        return total, *turned, *strided, gated, plain

    return step


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ordinary_weights_are_captured(dtype):
    step = plain_step(dtype)
    captured = capture(step, random(2, 3, 64, dtype=dtype), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    # norms 3, linear 1, rotary 4, gated_ffn 4, ffn 3
    assert len(captured) == 15
    arguments = random(2, 3, 64, dtype=dtype), torch.tensor([[6, 7, 8], [0, 3, 3]])
    for replayed, eager in zip(captured(*arguments), step(*arguments), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize(
    ("lookup", "table", "error"),
    [
        (ops.embedding, random(20, 64), ValueError),
        (ops.quant_embedding, quantize(random(20, 64), "int8"), IndexError),
    ],
    ids=["embedding", "quant_embedding"],
)
def test_lookups_are_captured_and_checked_at_each_replay(lookup, table, error):
    captured = capture(lambda ids: lookup(ids, table), torch.tensor([3, 4]))
    ids = torch.tensor([19, 0])
    expected = lookup(ids, table, impl="reference")
    assert torch.equal(captured(ids), expected)
    with pytest.raises(error, match=r"ids must be in \[0, 20\),.* got 20"):
        captured(torch.tensor([0, 20]))
    assert torch.equal(captured(ids), expected)


def test_a_table_that_is_trained_is_captured():
    table = torch.nn.Embedding(20, 64)
    captured = capture(lambda ids: ops.embedding(ids, table.weight), torch.tensor([3, 4]))
    ids = torch.tensor([19, 0])
    with torch.no_grad():
        table.weight.mul_(2)
    assert torch.equal(captured(ids), table(ids))


def test_positions_are_checked_at_each_replay():
    table = random(8, 4)
    x = random(1, 2, 1, 8)
    captured = capture(
        lambda x, p: ops.rotary(x, x, table, table, positions=p), x, torch.tensor([3])
    )
    expected = ops.rotary(x, x, table, table, positions=torch.tensor([7]))
    assert torch.equal(captured(x, torch.tensor([7]))[0], expected[0])
    for bad in (8, -1):
        with pytest.raises(ValueError, match=rf"positions must be in \[0, 8\), .*got {bad}"):
            captured(x, torch.tensor([bad]))


WEIGHT = quantize(torch.ones(16, 16), "int8")
FOREIGN = {
    "a product of torch": lambda x: F.linear(x, torch.ones(16, 16)),
    "arithmetic": lambda x: ops.quant_matmul(x, WEIGHT) + 1,
    "in place": lambda x: ops.quant_matmul(x, WEIGHT).add_(1),
    "a copy": lambda x: ops.quant_matmul(x, WEIGHT).t().contiguous(),
    "a hidden copy": lambda x: ops.quant_matmul(x.t(), WEIGHT),
    "a value": lambda x: x.sum().item(),
    "zeros": lambda x: torch.zeros(3),
    "the reference": lambda x: ops.quant_matmul(x, WEIGHT, impl="reference"),
}


@pytest.mark.parametrize("function", FOREIGN.values(), ids=FOREIGN)
def test_what_a_replay_would_not_repeat_is_refused(function):
    with pytest.raises(ValueError, match=r"capture: function must consist of native ops.*got aten"):
        capture(function, torch.ones(16, 16))
    # and leaves nothing switched on
    assert len(capture(lambda x: ops.quant_matmul(x, WEIGHT), torch.ones(2, 16))) == 1


BAD_INPUTS = [
    (lambda c: c(), "inputs must be 1, got 0"),
    (lambda c: c(torch.ones(3, 16)), "input 0 must be torch.float32"),
    (lambda c: c(torch.ones(2, 16).bfloat16()), "input 0 must be torch.float32"),
]


@pytest.mark.parametrize(("call", "message"), BAD_INPUTS, ids=[m for _, m in BAD_INPUTS])
def test_bad_inputs_of_a_replay(call, message):
    with pytest.raises(ValueError, match=f"capture: {message}"):
        call(capture(lambda x: ops.quant_matmul(x, WEIGHT), torch.ones(2, 16)))


@pytest.mark.parametrize("x", [3.0, torch.ones(2, device="meta")], ids=["number", "meta"])
def test_bad_inputs_of_a_capture(x):
    with pytest.raises(ValueError, match="capture: input 0 must be a CPU tensor"):
        capture(lambda x: x, x)


def test_a_capture_inside_a_capture_is_refused():
    def outer(x):
        capture(lambda: ops.quant_matmul(x, WEIGHT))
        return x

    with pytest.raises(ValueError, match="capture: function must not capture another"):
        capture(outer, torch.ones(2, 16))


def test_parameters_need_no_gradient_in_a_replay():
    weight = torch.nn.Parameter(torch.ones(16))
    captured = capture(lambda x: ops.add_norm(x, None, weight)[0], torch.ones(2, 16))
    out = captured(torch.arange(32.0).view(2, 16))
    assert not out.requires_grad
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(captured(torch.arange(32.0).view(2, 16)), out)
    assert out.abs().max() > 2
