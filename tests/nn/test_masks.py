import gc

import pytest
import torch
from torch import nn as torch_nn

from llmos_fast.nn import masks


def causal_mask(seq):
    return torch_nn.Transformer.generate_square_subsequent_mask(seq)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (causal_mask(5), "causal"),
        (causal_mask(5) == -torch.inf, "causal"),
        (causal_mask(1), "open"),
        (torch.zeros(5, 7), "open"),
        (torch.zeros(5, 5, dtype=torch.bool), "open"),
        (causal_mask(5)[:4], "other"),
        (causal_mask(5) + torch.eye(5), "other"),
        (causal_mask(5).T, "other"),
        (torch.randn(5, 5), "other"),
        (torch.zeros(2, 5, 5), "other"),
        (causal_mask(5).requires_grad_(), "other"),
        (torch.zeros(0, 0), "open"),
    ],
    ids=[
        "causal",
        "causal-bool",
        "one-token",
        "zeros",
        "false",
        "fewer-rows",
        "diagonal-1",
        "transposed",
        "random",
        "per-batch",
        "with-gradient",
        "empty",
    ],
)
def test_attn_mask_kind(mask, kind):
    assert masks.attn_mask_kind(mask) == kind


@pytest.mark.parametrize(
    ("hidden", "kind"),
    [
        ([[0, 0, 0], [0, 0, 0]], "none"),
        ([[0, 0, 0], [0, 1, 1]], "prefix"),
        ([[1, 1, 1], [0, 0, 0]], "prefix"),
        ([[1, 0, 0], [0, 0, 0]], "scattered"),
        ([[0, 1, 0], [0, 0, 1]], "scattered"),
    ],
    ids=str,
)
def test_padding_kind(hidden, kind):
    hidden = torch.tensor(hidden, dtype=torch.bool)
    for mask in (hidden, torch.zeros(2, 3).masked_fill(hidden, -torch.inf)):
        padding = masks.inspect_padding(mask)
        assert padding.kind == kind
        assert padding.counts == (tuple((~hidden).sum(1).tolist()) if kind == "prefix" else ())
    assert masks.inspect_padding(torch.zeros(2, 3).masked_fill(hidden, -1.0)).kind in (
        "bias",
        "none",
    )


def test_what_was_read_dies_with_the_mask():
    gc.collect()
    before = len(masks._paddings)
    mask = torch.ones(2, 3, dtype=torch.bool)
    masks.inspect_padding(mask)
    assert len(masks._paddings) == before + 1
    del mask
    gc.collect()
    assert len(masks._paddings) == before


def test_what_was_read_is_read_again_after_a_change():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert masks.inspect_padding(mask).kind == "none"
    mask[1, 2] = True
    assert masks.inspect_padding(mask).kind == "prefix"
    with torch.inference_mode():
        mask = torch.zeros(2, 3, dtype=torch.bool)
        assert masks.inspect_padding(mask).kind == "none"
        mask[1, 2] = True
        assert masks.inspect_padding(mask).kind == "prefix"


def test_one_visible_set_for_mask_lengths_window_and_causality():
    query = torch.zeros(2, 1, 4, 8)
    lengths = torch.tensor([4, 2])
    given = masks.Given(None, None, True)
    visible = masks.visible_pairs(
        masks.Masks(given, causal=True, key_lengths=lengths), (1, -1), query, 4
    )
    want = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(visible[0, 0], want)
    assert torch.equal(visible[1, 0], want & (torch.arange(4) < 2))
