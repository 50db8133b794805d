import math

import pytest
import torch
import torch.nn.functional as F

from llmos_fast.commands.torch_peer import TorchTransformerModel
from llmos_fast.models import TransformerModel
from llmos_fast.models.positional_encoding import PositionalEncoding, sinusoids


def build(ninp=8, nhead=2, dropout=0.0):
    torch.manual_seed(0)
    return TransformerModel(11, ninp, nhead, 16, 2, dropout)


TOKENS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("width", [1, 2, 7, 8], ids=str)
def test_sinusoids_by_the_formula(width):
    expected = [
        [
            (math.cos if c % 2 else math.sin)(p / 10000 ** ((c - c % 2) / width))
            for c in range(width)
        ]
        for p in range(9)
    ]
    torch.testing.assert_close(sinusoids(9, width), torch.tensor(expected))


def test_positional_encoding_refuses_long_input():
    with pytest.raises(ValueError, match="seq must be at most 4, got 5"):
        PositionalEncoding(2, 0.0, max_length=4)(torch.zeros(1, 5, 2))


@pytest.mark.parametrize(("ninp", "nhead"), [(8, 2), (7, 1), (9, 3)], ids=str)
def test_same_numbers_and_names_as_torch(ninp, nhead):
    ours = build(ninp, nhead)
    peer = TorchTransformerModel(11, ninp, nhead, 16, 2, 0.0)
    peer.load_state_dict(ours.state_dict())
    ours.load_state_dict(peer.state_dict())
    torch.testing.assert_close(ours(TOKENS), peer(TOKENS))
    ours.loss(TOKENS, TARGETS).backward()
    peer.loss(TOKENS, TARGETS).backward()
    for mine, theirs in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_is_causal():
    model = build().eval()
    changed = TOKENS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3:], after[:, 3:])


def test_loss_is_the_cross_entropy_of_forward():
    model = build()
    expected = F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(model.loss(TOKENS, TARGETS), expected)


def test_next_logits_is_the_last_row():
    model = build().eval()
    torch.testing.assert_close(model.next_logits(TOKENS), model(TOKENS)[:, -1])


def test_init_weights():
    model = build()
    assert model.decoder.bias.eq(0).all()
    for weight in (model.input_emb.weight, model.decoder.weight):
        assert weight.abs().max() <= 0.1 < weight.abs().max() * 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 2, 8, 1), "ntoken must be at least 1, got 0"),
        ((5, 8, 3, 8, 1), "ninp must be a multiple of nhead, got 8 and 3"),
        ((5, 8, 2, 8, 1, 1.0), "dropout must be in"),
    ],
    ids=["ntoken", "nhead", "dropout"],
)
def test_refuses_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerModel(*arguments)


def test_refuses_shapes():
    with pytest.raises(ValueError, match=r"tokens must be \[batch seq\], got shape \(5,\)"):
        build()(TOKENS[0])
    with pytest.raises(ValueError, match="targets must have the shape of tokens"):
        build().loss(TOKENS, TARGETS[:2])
