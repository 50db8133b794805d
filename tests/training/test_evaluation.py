import math

import pytest
import torch

from llmos_fast.data import windows
from llmos_fast.models import LanguageModel
from llmos_fast.training import perplexity


class KnownLogits(LanguageModel):
    """Says the same about every next token: the logits it is given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)

    def loss(self, tokens, targets):
        return -self(tokens).log_softmax(-1).gather(-1, targets[..., None]).mean()


def test_by_hand():
    """Targets 1, 0, 1 under probabilities 1/4 and 3/4."""
    model = KnownLogits([0.0, math.log(3.0)])
    text = windows(torch.tensor([0, 1, 0, 1]), batch_size=1, bptt=2)
    expected = (4 / 3 * 4 * 4 / 3) ** (1 / 3)
    torch.testing.assert_close(torch.tensor(perplexity(model, text)), torch.tensor(expected))


@pytest.mark.parametrize("bptt", [1, 3, 4, 7, 50], ids=str)
def test_a_model_without_memory_does_not_see_the_windows(bptt):
    model = KnownLogits([0.0, 1.0, 2.0])
    tokens = torch.randint(3, (41,), generator=torch.Generator().manual_seed(0))
    expected = perplexity(model, windows(tokens, 2, 1))
    got = perplexity(model, windows(tokens, 2, bptt))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected))


def test_uniform_model_and_overflow():
    text = windows(torch.tensor([0, 1, 2, 0]), 1, 2)
    assert round(perplexity(KnownLogits([5.0, 5.0, 5.0]), text), 4) == 3
    assert perplexity(KnownLogits([1e6, 0.0, 0.0]), text) == math.inf


def test_dropout_is_off_and_the_mode_restored(make_trainer):
    trainer = make_trainer(dropout=0.5)
    trainer.model.train()
    assert perplexity(trainer.model, trainer.text) == perplexity(trainer.model, trainer.text)
    assert trainer.model.training
