"""What only a GPU can show of the attention kernels: every launch, repetition, graphs, streams.

pytest tests/gpu -n 12    # pytest-xdist: most of the time goes into compilation
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast.kernels import launch, self_test
from llmos_fast.kernels.launch import TABLE, Variant
from llmos_fast.kernels.runtime import architecture
from torch import nn

from llmos_fast import dispatch, ops, reference
from llmos_fast.testing import (
    assert_close_to_truth,
    assert_within_budget,
    native_precision,
    random,
)

DEVICE = torch.device("cuda", torch.cuda.current_device())
KEYS = [  # kernel, dtype, head_dim
    (kernel, dtype, head_dim)
    for kernel in TABLE
    for dtype in (torch.bfloat16, torch.float32)
    for head_dim in TABLE[kernel][architecture(DEVICE)][dtype.itemsize]
]


def launches(kernel, dtype, head_dim):
    return dict.fromkeys(launch.candidates(kernel, DEVICE, dtype, head_dim))


def on_gpu(*shape, dtype=torch.bfloat16, requires_grad=False):
    return random(*shape, dtype=dtype).to(DEVICE).requires_grad_(requires_grad)


def qkv(batch, heads_q, heads_kv, seq_q, seq_k, head_dim, dtype=torch.bfloat16, grad=True):
    return {
        "query": on_gpu(batch, heads_q, seq_q, head_dim, dtype=dtype, requires_grad=grad),
        "key": on_gpu(batch, heads_kv, seq_k, head_dim, dtype=dtype, requires_grad=grad),
        "value": on_gpu(batch, heads_kv, seq_k, head_dim, dtype=dtype, requires_grad=grad),
    }


BATCH, HEADS_Q, HEADS_KV, SEQ_Q, SEQ_K = 2, 4, 2, 200, 264


def with_mask():
    mask = torch.rand(BATCH, 1, SEQ_Q, SEQ_K, device=DEVICE) > 0.3
    mask[:, :, :, 64:160] = False  # whole tiles
    mask[:, :, 7] = False
    return {"mask": mask}


def with_bias(dtype):
    return {"bias": on_gpu(1, HEADS_Q, SEQ_Q, SEQ_K, dtype=dtype, requires_grad=True)}


def with_sinks(dtype):
    return {"sinks": on_gpu(HEADS_Q, dtype=dtype, requires_grad=True)}


def with_slopes():
    return {"alibi_slopes": torch.rand(HEADS_Q, device=DEVICE)}


FEATURES = {  # dtype -> (more tensors, options)
    "plain": lambda dtype: ({}, {}),
    "causal": lambda dtype: ({}, {"causal": True}),
    "bottom_right": lambda dtype: ({}, {"causal": "bottom_right", "return_lse": True}),
    "window": lambda dtype: ({}, {"causal": True, "window": (70, -1)}),
    "window of both sides": lambda dtype: ({}, {"window": (5, 40)}),
    "key_lengths": lambda dtype: ({"key_lengths": torch.tensor([264, 3], device=DEVICE)}, {}),
    "mask": lambda dtype: (with_mask(), {}),
    "bias": lambda dtype: (with_bias(dtype), {}),
    "alibi": lambda dtype: (with_slopes(), {}),
    "softcap": lambda dtype: ({}, {"softcap": 5.0}),
    "sinks": lambda dtype: (with_sinks(dtype), {}),
    "dropout": lambda dtype: ({}, {"dropout_p": 0.2}),
    "everything": lambda dtype: (
        with_mask() | with_bias(dtype) | with_sinks(dtype) | with_slopes(),
        {
            "causal": "bottom_right",
            "window": (150, -1),
            "softcap": 5.0,
            "dropout_p": 0.1,
            "scale": 0.3,
            "return_lse": True,
        },
    ),
}
HEAVY = {"mask", "bias", "alibi_slopes", "softcap", "dropout_p"}
HIDING = {"sinks", "key_lengths", "window", "cu_seqlens"}


def wrong_launches(key, tensors, options):
    """What each launch of ``key`` that takes the call does wrong: [] where all are right."""
    kernel, dtype, head_dim = key
    if kernel == "attention_forward":
        tensors = {n: t.detach() for n, t in tensors.items()}
    given = tensors.keys() | options.keys()
    failures = []
    for candidate in launches(kernel, dtype, head_dim):
        if candidate.light and given & HEAVY:
            continue
        if candidate.WARP_SPECIALIZE and given & (HEAVY | HIDING):
            continue
        try:
            with launch.forced(**{kernel: candidate}):
                assert_within_budget(
                    ops.attention,
                    reference.attention,
                    tensors,
                    options,
                    impl="triton",
                    reduction=SEQ_K * head_dim,
                )
        except Exception as error:
            torch.cuda.synchronize()  # raises where nothing more can be learned here
            failures.append(f"{candidate}: {type(error).__name__}: {error}")
    return failures


@pytest.fixture
def without_self_test(monkeypatch):
    """Launches are forced here, whatever the self-test thinks of those that are not."""
    monkeypatch.setattr(self_test, "ensure", lambda variant, device: None)


def kept(key, feature):
    """The bias has a kernel of its own; fp32 compiles slowly and differs in its products alone."""
    kernel, dtype, _ = key
    if kernel == "attention_backward_bias" and feature not in ("bias", "everything"):
        return False
    return dtype != torch.float32 or feature in ("causal", "bias", "everything")


@pytest.mark.usefixtures("without_self_test")
@pytest.mark.parametrize(
    ("key", "feature"), [(k, f) for k in KEYS for f in FEATURES if kept(k, f)], ids=str
)
def test_every_launch_is_within_the_budget(key, feature):
    _, dtype, head_dim = key
    more, options = FEATURES[feature](dtype)
    tensors = qkv(BATCH, HEADS_Q, HEADS_KV, SEQ_Q, SEQ_K, head_dim, dtype) | more
    assert wrong_launches(key, tensors, options) == []


@pytest.mark.usefixtures("without_self_test")
@pytest.mark.parametrize("missing", [24, 7], ids=["columns missing", "rows not aligned"])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_every_launch_takes_odd_head_dims(key, missing):
    _, dtype, head_dim = key
    tensors = {
        "query": on_gpu(1, 2, 100, head_dim - 24, dtype=dtype, requires_grad=True),
        "key": on_gpu(1, 1, 77, head_dim - 24, dtype=dtype, requires_grad=True),
        "value": on_gpu(1, 1, 77, head_dim - missing, dtype=dtype, requires_grad=True),
    }
    if key[0] == "attention_backward_bias":
        tensors["bias"] = on_gpu(100, 77, dtype=dtype, requires_grad=True)
    assert wrong_launches(key, tensors, {"causal": True}) == []


@pytest.mark.usefixtures("without_self_test")
@pytest.mark.parametrize("key", [k for k in KEYS if k[0] != "attention_backward_bias"], ids=str)
def test_every_launch_takes_packed_sequences(key):
    _, dtype, head_dim = key
    cu_q = torch.tensor([0, 130, 131, 131, 300], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 100, 160, 170, 264], dtype=torch.int32, device=DEVICE)
    tensors = {
        "query": on_gpu(300, HEADS_Q, head_dim, dtype=dtype, requires_grad=True),
        "key": on_gpu(264, HEADS_KV, head_dim, dtype=dtype, requires_grad=True),
        "value": on_gpu(264, HEADS_KV, head_dim, dtype=dtype, requires_grad=True),
    }
    options = {"cu_seqlens": (cu_q, cu_k, 169, 100), "causal": "bottom_right"}
    assert wrong_launches(key, tensors, options) == []


VARIANTS = [
    Variant(kernel, candidate, head_dim, dtype, hides)
    for kernel in self_test.KERNELS
    for head_dim in TABLE[kernel][architecture(DEVICE)][2]
    for dtype in (torch.bfloat16, torch.float16)
    for candidate in launches(kernel, dtype, head_dim)
    for hides in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS, ids=self_test.name)
def test_every_launch_passes_the_self_test(variant):
    assert self_test.passes(variant, DEVICE)


def test_a_thousand_backward_runs_are_bit_equal():
    tensors = qkv(2, 8, 2, 1000, 1000, 128)
    tensors |= {
        "bias": on_gpu(1, 8, 1000, 1000, requires_grad=True),
        "sinks": on_gpu(8, requires_grad=True),
    }
    options = {"causal": True, "dropout_p": 0.1, "impl": "triton"}
    leaves = list(tensors.values())
    out = ops.attention(**tensors, **options)
    d_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    for _ in range(1000):
        gradients = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        assert all(torch.equal(g, e) for g, e in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_a_graph_of_attention_replays_what_eager_computes(captured, options):
    tensors = qkv(2, 4, 2, 300, 300, 64, grad=False)
    graph, out = captured(lambda: ops.attention(**tensors, impl="triton", **options))
    for _ in range(3):
        for tensor in tensors.values():
            tensor.normal_()
        graph.replay()
        assert torch.equal(out, ops.attention(**tensors, impl="triton", **options))


def test_a_graph_of_forward_and_backward_replays_what_eager_computes(captured):
    tensors = qkv(2, 4, 2, 300, 300, 64)
    d_out = on_gpu(2, 4, 300, 64)

    def run():
        out = ops.attention(**tensors, causal=True, impl="triton")
        return torch.autograd.grad(out, list(tensors.values()), d_out)

    graph, gradients = captured(run)
    for _ in range(3):
        d_out.normal_()
        with torch.no_grad():
            tensors["query"].normal_()
        graph.replay()
        for gradient, expected in zip(gradients, run(), strict=True):
            assert torch.equal(gradient, expected)


class Block(nn.Module):
    """Self-attention between two projections."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(256, 3 * 256), nn.Linear(256, 256)

    def forward(self, x):
        heads = (t.unflatten(-1, (4, 64)).transpose(1, 2) for t in self.inside(x).chunk(3, -1))
        return self.outside(ops.attention(*heads, causal=True).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("default")  # Inductor's advice is not about us
def test_a_compiled_module_computes_what_it_says():
    module = Block().to(DEVICE, torch.bfloat16)
    x = on_gpu(2, 300, 256, requires_grad=True)

    def run(module, x):
        out = module(x)
        return out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))

    compiled = run(torch.compile(module, fullgraph=True), x)
    with dispatch.use("reference"):
        with native_precision():
            eager = run(module, x)
        truth = run(module.double(), x.detach().double().requires_grad_())
    for name, found, low, true in zip(("out", "d_x"), compiled, eager, truth, strict=True):
        assert_close_to_truth(found, low, true, reduction=300 * 256, name=name)


LARGE = 2**31


def test_tensors_of_more_than_2_31_elements():
    """Rows of 16384 elements, 131,200 of them: the last ones lie beyond 32-bit offsets."""
    heads, head_dim, seq, last = 128, 128, 131_200, 256
    assert heads * head_dim * seq > LARGE
    window = {"causal": "bottom_right", "window": (last - 1, -1)}

    def draw():
        x = torch.empty(1, seq, heads, head_dim, dtype=torch.bfloat16, device=DEVICE).normal_()
        return x.transpose(1, 2)

    query, key, value = (draw().requires_grad_() for _ in range(3))
    out = ops.attention(query, key, value, impl="triton", **window)
    d_out = draw()
    gradients = torch.autograd.grad(out, (query, key, value), d_out)

    # the last rows see no keys before these, and nobody else sees their keys
    def tail(x, rows):
        return x.detach()[:, -1:, -rows:]

    small = [tail(query, last), tail(key, 2 * last), tail(value, 2 * last), tail(d_out, last)]
    d_query, d_key, d_value = gradients
    found = [tail(out, last), tail(d_query, last), tail(d_key, last), tail(d_value, last)]

    def run(dtype):
        *inputs, direction = (x.to(dtype) for x in small)
        inputs = [x.requires_grad_() for x in inputs]
        out = reference.attention(*inputs, **window)
        of_query, of_key, of_value = torch.autograd.grad(out, inputs, direction)
        return out.detach(), of_query, tail(of_key, last), tail(of_value, last)

    with native_precision():
        eager = run(torch.bfloat16)
    names = ("out", "d_query", "d_key", "d_value")
    for name, ours, low, true in zip(names, found, eager, run(torch.float64), strict=True):
        assert_close_to_truth(ours, low, true, reduction=last * head_dim, name=name)


def test_masks_of_more_than_2_31_elements():
    seq, last = 46_400, 128
    assert seq**2 > LARGE
    mask = torch.rand(seq, seq, device=DEVICE, dtype=torch.bfloat16) > 0.5
    query, key, value = qkv(1, 1, 1, seq, seq, 64, grad=False).values()
    out = ops.attention(query, key, value, mask=mask, impl="triton")
    small = [query[:, :, -last:], key, value]
    rows = mask[-last:]
    truth = reference.attention(*(x.double() for x in small), mask=rows)
    with native_precision():
        eager = reference.attention(*small, mask=rows)
    assert_close_to_truth(out[:, :, -last:], eager, truth, reduction=seq)
