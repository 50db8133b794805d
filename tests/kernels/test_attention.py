"""What the tiles of the GPU attention kernels must not show: their size, and what they skip."""

import pytest
import torch
from llmos_fast.kernels import launch
from llmos_fast.kernels.launch import Launch

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, outputs_and_gradients, random

KERNELS = (
    "attention_forward",
    "attention_backward_key",
    "attention_backward_query",
    "attention_backward_bias",
)
TILINGS = [Launch(16, 16, 4, 1), Launch(16, 64, 4, 1, TMA=True), Launch(64, 32, 4, 1)]


def tiled(config):
    return launch.forced(**dict.fromkeys(KERNELS, config))


def one_by_one(*shape):
    """Values that show the probabilities themselves."""
    return torch.eye(shape[-2], shape[-1]).expand(shape)


@pytest.mark.parametrize("config", TILINGS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window": (20, -1)}, {"causal": "bottom_right"}], ids=str
)
def test_any_tiling_is_within_the_budget(config, options, dtype):
    tensors = {
        "query": random(1, 4, 50, 24, dtype=dtype, requires_grad=True),
        "key": random(1, 2, 70, 24, dtype=dtype, requires_grad=True),
        "value": random(1, 2, 70, 40, dtype=dtype, requires_grad=True),
        "bias": random(1, 4, 50, 70, dtype=dtype, requires_grad=True),
        "mask": torch.rand(1, 1, 50, 70) > 0.3,
    }
    options = options | {"return_lse": True, "dropout_p": 0.2}
    with tiled(config):
        assert_within_budget(
            ops.attention, reference.attention, tensors, options, impl="triton", reduction=70 * 40
        )


@pytest.mark.parametrize("dtype", [torch.float16], ids=str)
def test_fp16(dtype):
    tensors = {n: random(1, 2, 40, 16, dtype=dtype, requires_grad=True) for n in ("query", "key")}
    tensors["value"] = random(1, 2, 40, 16, dtype=dtype, requires_grad=True)
    options = {"causal": True, "softcap": 5.0}
    assert_within_budget(
        ops.attention, reference.attention, tensors, options, impl="triton", reduction=40 * 16
    )


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((8, 8), torch.float32),
        ((96, 40), torch.float32),
        ((200, 256), torch.float32),
        ((300, 20), torch.bfloat16),
        ((512, 512), torch.bfloat16),
    ],
    ids=str,
)
def test_head_dims(sizes, dtype):
    head_dim, head_dim_v = sizes
    tensors = {
        "query": random(1, 2, 33, head_dim, dtype=dtype, requires_grad=True),
        "key": random(1, 1, 33, head_dim, dtype=dtype, requires_grad=True),
        "value": random(1, 1, 33, head_dim_v, dtype=dtype, requires_grad=True),
    }
    options = {"causal": True}
    assert_within_budget(
        ops.attention, reference.attention, tensors, options, impl="triton",
        reduction=66 * max(sizes),
    )  # fmt: skip


def test_dropout_draws_the_same_bits_in_every_tiling_and_in_both_directions():
    query, key = random(2, 2, 40, 16), random(2, 2, 64, 16)
    value = one_by_one(2, 2, 64, 64).contiguous().requires_grad_()
    drawn = []
    for config in TILINGS:
        with tiled(config):
            torch.manual_seed(3)
            out = ops.attention(query, key, value, dropout_p=0.5, impl="triton")
            directions = one_by_one(2, 2, 40, 64)
            (d_value,) = torch.autograd.grad(out, value, directions)
        drawn.append(out.detach() != 0)
        # out = P and d_value = P^T here, both with what was dropped in them
        assert torch.equal(d_value[..., :40].transpose(-1, -2) != 0, drawn[-1])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert 0.4 < drawn[0].float().mean() < 0.6
    torch.manual_seed(3)
    defined = reference.attention(query, key, value, dropout_p=0.5)
    assert torch.equal(defined != 0, drawn[0])


def test_rows_of_probabilities_sum_to_one():
    query, key = random(1, 2, 50, 16), random(1, 2, 70, 16)
    out = ops.attention(query, key, torch.ones(1, 2, 70, 8), causal="bottom_right", impl="triton")
    # 70 terms, each with a rounding of fp32, and the division
    assert (out - 1.0).abs().max() <= 72 * torch.finfo(torch.float32).eps


def test_runs_are_bit_equal():
    tensors = {n: random(2, 2, 40, 16, requires_grad=True) for n in ("query", "key", "value")}
    tensors["bias"] = random(40, 40, requires_grad=True)
    options = {"causal": True, "dropout_p": 0.1, "impl": "triton"}
    first, second = (outputs_and_gradients(ops.attention, tensors, options) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


VISIBLE = torch.zeros(96, 96, dtype=torch.bool)
VISIBLE[:, 5:20] = True  # nothing of keys 32..63, a hole
VISIBLE[40:60, 70:80] = True


@pytest.mark.parametrize(
    ("options", "poisoned"),
    [
        ({"mask": VISIBLE}, slice(32, 64)),
        ({"mask": VISIBLE & True, "causal": True}, slice(32, 64)),
        ({"key_lengths": torch.tensor([30])}, slice(30, 96)),
        ({"window": (0, 0), "causal": True}, None),
    ],
    ids=["mask", "mask and causal", "lengths", "window"],
)
@pytest.mark.parametrize("config", [Launch(32, 32, 4, 1, TMA=True), Launch(32, 32, 4, 1)], ids=str)
def test_tiles_that_are_hidden_are_never_computed(options, poisoned, config):
    """A NaN in the values reaches every row of a tile that is multiplied, hidden or not."""
    query, key, value = (random(1, 2, 96, 16, requires_grad=True) for _ in range(3))
    if poisoned is None:  # one tile sees itself only: poison the first, look at the others
        poisoned, seen = slice(0, 32), slice(32, 96)
    else:
        seen = slice(0, 96)
    with torch.no_grad():
        value[:, :, poisoned] = torch.nan
    with tiled(config):
        out = ops.attention(query, key, value, impl="triton", **options)
        assert out[:, :, seen].isfinite().all()
        gradients = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    # the poisoned keys' own gradients are 0, or not of this row: dV never reads V
    assert gradients[0][:, :, seen].isfinite().all()
    assert gradients[2].isfinite().all()


@pytest.mark.parametrize("window", [(1, 0), (0, 1), (1, -1), (-1, 1), (33, 0)], ids=str)
def test_windows_that_end_one_pair_into_a_tile(window):
    """Tiles of 32: the last row that sees a tile of keys is the first of its own."""
    tensors = {n: random(1, 1, 64, 16, requires_grad=True) for n in ("query", "key", "value")}
    assert_within_budget(
        ops.attention, reference.attention, tensors, {"window": window}, impl="triton",
        reduction=64 * 16,
    )  # fmt: skip


def test_lengths_that_lie_outside_of_the_tensors_are_clamped():
    """Values on a GPU cannot be looked at without waiting for it: nothing may be read beyond."""
    x = random(1, 2, 20, 8)
    whole = ops.attention(x, x, x, impl="triton")
    too_long = torch.tensor([1000])
    assert torch.equal(ops.attention(x, x, x, key_lengths=too_long, impl="triton"), whole)
    negative = torch.tensor([-5])
    assert not ops.attention(x, x, x, key_lengths=negative, impl="triton").any()
    packed = random(20, 2, 8)
    cu = torch.tensor([-3, 10, 5, 900], dtype=torch.int32)
    out = ops.attention(packed, packed, packed, cu_seqlens=(cu, cu, 900, 900), impl="triton")
    assert out.isfinite().all()


def test_rows_of_no_sequence_are_zero():
    packed = random(30, 2, 8, requires_grad=True)
    cu = torch.tensor([0, 10, 20], dtype=torch.int32)
    out, lse = ops.attention(
        packed, packed, packed, cu_seqlens=(cu, cu, 10, 10), return_lse=True, impl="triton"
    )
    assert not out[20:].any()
    assert (lse[:, 20:] == -torch.inf).all()
    (gradient,) = torch.autograd.grad(out.sum(), packed)
    assert not gradient[20:].any()


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 1, 40, 1), (1, 1), (2, 2, 40, 40)], ids=str)
def test_bias_gradient_has_the_bias_shape_and_dtype(shape, dtype):
    tensors = {
        "query": random(2, 2, 40, 8, dtype=dtype),
        "key": random(2, 2, 40, 8, dtype=dtype),
        "value": random(2, 2, 40, 8, dtype=dtype),
        "bias": random(*shape, dtype=dtype, requires_grad=True),
        # without them the gradient of a bias that is one number would be 0
        "sinks": random(2, dtype=dtype),
    }
    if shape == (1, 1) and dtype == torch.bfloat16:
        # eager's error of one number may be next to nothing: no measure for ours
        (gradient,) = outputs_and_gradients(ops.attention, tensors, {"impl": "triton"})[1].values()
        assert gradient.shape == shape
        assert gradient.dtype == dtype
        return
    assert_within_budget(
        ops.attention, reference.attention, tensors, {}, impl="triton", reduction=4 * 40 * 40 * 8
    )


def test_negative_scale():
    tensors = {n: random(1, 1, 9, 8, requires_grad=True) for n in ("query", "key", "value")}
    assert_within_budget(
        ops.attention, reference.attention, tensors, {"scale": -0.5}, impl="triton", reduction=72
    )


def test_float_masks_of_minus_infinity_hide():
    query, key, value = (random(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    bias[7] = -torch.inf
    out = ops.attention(query, key, value, bias=bias, impl="triton")
    assert not out[:, :, 7].any()
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][:, :, 7].any()
