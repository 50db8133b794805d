"""aten's flash attention operators as llmos_fast implements them, against F.sdpa.

There is no flash attention on CPU tensors, so aten's names are free there: the tests register the
same functions under the CPU key, and autograd and varlen_attn reach them as on CUDA.
"""

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from torch.nn.attention import varlen

from llmos_fast import dispatch, ops
from llmos_fast.integrations import sdpa
from llmos_fast.testing import assert_close_to_truth, implementations_of, random

if "triton" not in implementations_of("attention"):
    pytest.skip("the Triton kernels cannot be imported", allow_module_level=True)
if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of flash attentions", allow_module_level=True)
# where torch has kernels of its own, it says that they are replaced
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, HEAD_DIM = 2, 4, 16


@pytest.fixture(scope="module", autouse=True)
def operators():
    """aten's operators on the device of the tests."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in sdpa.OPERATORS.items():
        library.impl(name, function, DEVICE.upper())
    yield
    del library


def make_tensors(*shape, heads_kv=HEADS, dtype=torch.float32, seq_k=None):
    """query, key and value [.., seq, .., head_dim]; ``shape`` is (batch, heads, seq)."""
    batch, heads, seq = shape
    sizes = [(heads, seq), (heads_kv, seq_k or seq), (heads_kv, seq_k or seq)]
    return [
        random(batch, h, s, HEAD_DIM, dtype=dtype, seed=i).to(DEVICE).requires_grad_()
        for i, (h, s) in enumerate(sizes)
    ]


def run(function, tensors, dtype=None):
    """Output of ``function`` and gradients of a fixed combination of it, maybe in another dtype."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    direction = random(*out.shape, seed=9).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def check(ours, theirs, tensors):
    """Both functions on the same tensors, in the error budget of the second in float64."""
    results = run(ours, tensors), run(theirs, tensors), run(theirs, tensors, torch.float64)
    for name, out, eager, truth in zip(("out", "query", "key", "value"), *results, strict=True):
        # a gradient chains two sums, over features and over keys or a group's queries
        reduction = HEAD_DIM * HEADS * max(t.shape[-2] for t in tensors)
        assert_close_to_truth(out, eager, truth, reduction=reduction, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads_kv", [HEADS, 2])
def test_scaled_dot_product(heads_kv, is_causal, dtype):
    def ours(query, key, value):
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, scale=0.3
        )[0]

    def theirs(query, key, value):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=0.3, enable_gqa=True
        )

    check(ours, theirs, make_tensors(BATCH, HEADS, 37, heads_kv=heads_kv, dtype=dtype))


def test_scaled_dot_product_is_causal_from_the_first_key():
    query, key, value = make_tensors(1, HEADS, 5, seq_k=9)
    out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, expected)


def allowed(seq_q, seq_k, window):
    """Who may attend to whom, aligned at the ends."""
    distance = torch.arange(seq_k) - torch.arange(seq_q)[:, None] - (seq_k - seq_q)
    left, right = (seq_k + seq_q if side == -1 else side for side in window)
    return ((distance >= -left) & (distance <= right)).to(DEVICE)


@pytest.mark.parametrize(
    ("seq_k", "window"), [(9, (-1, -1)), (21, (-1, 0)), (21, (3, 0)), (9, (3, 2)), (9, (3, -1))]
)
def test_dense_flash_attention(seq_k, window):
    def ours(*tensors):
        return torch.ops.aten._flash_attention_forward(
            *(t.transpose(1, 2) for t in tensors), None, None, 9, seq_k, 0.0, window == (-1, 0),
            False, window_size_left=window[0], window_size_right=window[1],
        )[0].transpose(1, 2)  # fmt: skip

    def theirs(*tensors):
        return F.scaled_dot_product_attention(*tensors, attn_mask=allowed(9, seq_k, window))

    check(ours, theirs, make_tensors(BATCH, HEADS, 9, seq_k=seq_k))


LENGTHS_Q, LENGTHS_K = [5, 1, 13], [9, 4, 13]


def make_packed(lengths_q, lengths_k):
    """Tensors [total heads head_dim], and what varlen_attn is told of them."""
    tensors = make_tensors(1, HEADS, sum(lengths_q), heads_kv=2, seq_k=sum(lengths_k))
    cumulative = [
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32, device=DEVICE)
        for n in (lengths_q, lengths_k)
    ]
    lengths = (*cumulative, max(lengths_q), max(lengths_k))
    return [t.squeeze(0).transpose(0, 1) for t in tensors], lengths


@pytest.mark.parametrize(
    ("lengths_k", "window"),
    [(LENGTHS_K, (-1, -1)), (LENGTHS_K, (-1, 0)), (LENGTHS_K, (2, 0)), (LENGTHS_Q, (3, 2))],
)
def test_varlen_attn(lengths_k, window):
    tensors, lengths = make_packed(LENGTHS_Q, lengths_k)

    def ours(*tensors):
        return varlen.varlen_attn(*tensors, *lengths, window_size=window, enable_gqa=True)

    def theirs(*tensors):
        query, key, value = (t.transpose(0, 1) for t in tensors)
        splits = (query.split(LENGTHS_Q, 1), key.split(lengths_k, 1), value.split(lengths_k, 1))
        parts = [
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed(q.shape[1], k.shape[1], window), enable_gqa=True
            )
            for q, k, v in zip(*splits, strict=True)
        ]
        return torch.cat(parts, dim=1).transpose(0, 1)

    check(ours, theirs, tensors)


@pytest.mark.skipif(not hasattr(varlen, "varlen_attn_out"), reason="a newer torch has it")
@torch.no_grad()
def test_varlen_attn_into_a_tensor():
    tensors, lengths = make_packed(LENGTHS_Q, LENGTHS_K)
    out = torch.empty(sum(LENGTHS_Q), HEADS, HEAD_DIM, device=DEVICE)
    varlen.varlen_attn_out(out, *tensors, *lengths, enable_gqa=True)
    assert torch.equal(out, varlen.varlen_attn(*tensors, *lengths, enable_gqa=True))


def test_dropout_draws_the_same_bits_in_both_directions():
    def ours(*tensors):
        torch.manual_seed(3)
        return torch.ops.aten._scaled_dot_product_flash_attention(*tensors, 0.4, True)[0]

    def op(*tensors):
        torch.manual_seed(3)
        return ops.attention(*tensors, causal=True, dropout_p=0.4, impl="triton")

    tensors = make_tensors(BATCH, HEADS, 21)
    for result, expected in zip(run(ours, tensors), run(op, tensors), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_results_look_as_torch_compile_expects(order, dropout_p):
    tensors = [
        t.detach().permute(order).contiguous().permute(order) for t in make_tensors(2, HEADS, 7)
    ]
    fake = [torch.empty_like(t, device="meta") for t in tensors]
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    ours, expected = (forward(*x, dropout_p, True) for x in (tensors, fake))
    gradients, fake_gradients = (
        backward(result[0], *x, *result[:6], dropout_p, True, *result[6:8])
        for x, result in ((tensors, ours), (fake, expected))
    )
    for have, want in zip((*ours, *gradients), (*expected, *fake_gradients), strict=True):
        if isinstance(want, torch.Tensor):
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            assert have.stride() == want.stride()
        else:
            assert have == want


BAD = [
    ({"return_debug_mask": True}, "return_debug_mask must be left out"),
    ({"seqused_k": torch.ones(2, dtype=torch.int32)}, "seqused_k must be left out"),
    ({"alibi_slopes": torch.ones(HEADS)}, "alibi_slopes must be left out"),
    ({"block_table": torch.ones(2, 1, dtype=torch.int32)}, "block_table must be left out"),
    ({"cum_seq_k": torch.zeros(2, dtype=torch.int32)}, "cum_seq_k must be given where cum_seq_q"),
    ({"window_size_right": 2}, r"window_size must end at the query .* got \(-1, 2\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:20] for _, m in BAD])
def test_refusals(change, message):
    query, key, value = (t.transpose(1, 2) for t in make_tensors(2, HEADS, 5, seq_k=6))
    call = {
        "cum_seq_q": None,
        "cum_seq_k": None,
        "max_q": 5,
        "max_k": 6,
        "dropout_p": 0.0,
        "is_causal": False,
        "return_debug_mask": False,
    }
    with pytest.raises(ValueError, match=f"_flash_attention_forward: {message}"):
        torch.ops.aten._flash_attention_forward(query, key, value, **(call | change))


def has_cuda_kernel(name):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA")


@pytest.mark.skipif(DEVICE == "cuda", reason="torch's own kernels are always there")
def test_activation_and_back():
    sdpa.register()
    assert not any(map(has_cuda_kernel, sdpa.OPERATORS))
    torch.nn.attention.activate_flash_attention_impl("llmos_fast")
    assert all(map(has_cuda_kernel, sdpa.OPERATORS))
    assert torch.nn.attention.current_flash_attention_impl() == "llmos_fast"
    torch.nn.attention.restore_flash_attention_impl()
    assert not any(map(has_cuda_kernel, sdpa.OPERATORS))
    activation = sdpa._Activation()
    assert all(map(has_cuda_kernel, sdpa.OPERATORS))
    activation.remove()
    assert not any(map(has_cuda_kernel, sdpa.OPERATORS))


def test_needs_the_registry(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match="needs a torch that has"):
        sdpa.register()


def test_needs_the_kernels(monkeypatch):
    missing = (dispatch.Implementation("triton", None, "cannot be imported (no triton)"),)
    monkeypatch.setitem(dispatch._REGISTRY, "attention", missing)
    with pytest.raises(RuntimeError, match="attention cannot be imported"):
        sdpa.register()
