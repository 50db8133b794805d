import pytest
import torch

from llmos_fast.data import build_vocab
from llmos_fast.generation import GREEDY, Sampling, generate, generate_text
from llmos_fast.models import LanguageModel, TransformerModel

VOCABULARY = build_vocab(["red green blue"])


class CountsUp(LanguageModel):
    """The most likely next token is the one after the last; ``<unk>`` (0) comes second."""

    def __init__(self):
        super().__init__()
        self.device_marker = torch.nn.Parameter(torch.zeros(1))
        self.widths = []

    def forward(self, tokens):
        self.widths.append(tokens.shape[1])
        logits = torch.zeros(*tokens.shape, 5)
        logits[..., 0] = 5.0
        return logits.scatter(-1, ((tokens + 1) % 5)[..., None], 9.0)


def small_model():
    torch.manual_seed(0)
    return TransformerModel(5, 8, 2, 8, 1)


def test_greedy_and_context():
    model = CountsUp()
    out = generate(model, torch.tensor([[1], [3]]), 4, sampling=GREEDY, context=3)
    assert out.tolist() == [[1, 2, 3, 4, 0], [3, 4, 0, 1, 2]]
    assert model.widths == [1, 2, 3, 3]


def test_banned_tokens_are_never_produced():
    out = generate(
        small_model(), torch.tensor([[1]]), 200, sampling=Sampling(), context=4, banned=[0, 2]
    )
    assert set(out[0].tolist()) == {1, 3, 4}


def test_the_seed_decides():
    def draw(seed):
        prompt = torch.tensor([[2]])
        return generate(
            small_model(), prompt, 30, sampling=Sampling(), seed=seed, context=8
        ).tolist()

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("prompt", "length", "context", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), 1, 1, "prompt"),
        (torch.zeros(1, 1, dtype=torch.long), -1, 1, "length must be at least 0, got -1"),
        (torch.zeros(1, 1, dtype=torch.long), 1, 0, "context must be at least 1, got 0"),
    ],
    ids=["prompt", "length", "context"],
)
def test_refuses(prompt, length, context, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(), prompt, length, sampling=GREEDY, context=context)


def text(prompt, length, **policy):
    return generate_text(
        CountsUp(), VOCABULARY, prompt, length, sampling=GREEDY, context=4, **policy
    )


def test_text():
    assert text("red", 2) == "red green blue"
    assert text("", 2) == "red green"  # <eos> is 1, red is 2


def test_unknown_words_of_the_prompt():
    assert text("zebra", 0) == "<unk>"
    with pytest.raises(ValueError, match="zebra"):
        text("zebra", 0, unknown="raise")


def test_unknown_is_produced_only_where_asked():
    assert text("blue", 1, allow_unknown=True) == "blue <unk>"
    assert "<unk>" not in text("blue", 1)
