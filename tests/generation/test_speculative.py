import pytest
import torch

from llmos_fast.generation import (
    Acceptance,
    DraftModel,
    PromptLookup,
    Sampling,
    generate,
    speculate,
    speculative,
    stream,
)
from llmos_fast.generation.speculative import Proposal
from llmos_fast.nn import quantize_

PROMPT = [5, 9, 3, 5, 9, 3, 5, 9]


@pytest.fixture
def model(tiny):
    return tiny()


@pytest.fixture
def proposer(tiny):
    """proposer(kind): it."""

    def make(kind):
        if kind == "lookup":
            return PromptLookup(longest=3, shortest=1)
        return DraftModel(tiny() if kind == "same" else tiny("gpt2", seed=3))

    return make


class Random:
    """Proposes at random, with a distribution that it knows, or without one."""

    def __init__(self, certain, vocabulary=4):
        self.certain, self.vocabulary = certain, vocabulary
        self.generator = torch.Generator().manual_seed(1)

    def propose(self, tokens, count):
        logits = torch.randn(count, self.vocabulary, generator=self.generator)
        logits += torch.linspace(1.5, -1.5, self.vocabulary)
        if self.certain:
            return Proposal(logits.argmax(-1).tolist())
        drawn_from = logits.softmax(-1)
        drawn = torch.multinomial(drawn_from, 1, generator=self.generator)
        return Proposal(drawn[:, 0].tolist(), drawn_from)


@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["lookup", "same", "other"])
def test_greedy_tokens_are_those_of_stream(kind, draft_tokens, model, proposer):
    expected = list(stream(model, PROMPT, 40))
    assert list(speculate(model, PROMPT, 40, proposer(kind), draft_tokens=draft_tokens)) == expected


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=["fp32", "int8"])
@pytest.mark.parametrize("kind", ["lookup", "other"])
def test_greedy_tokens_of_a_quantized_model(kind, cache_dtype, model, proposer):
    quantize_(model, "int4", 32)
    expected = list(stream(model, PROMPT, 40, cache_dtype=cache_dtype))
    found = speculate(model, PROMPT, 40, proposer(kind), cache_dtype=cache_dtype)
    assert list(found) == expected


@pytest.mark.parametrize("kind", ["lookup", "same"])
def test_stops_where_stream_does(kind, model, proposer):
    whole = list(stream(model, PROMPT, 30))
    for stop_ids in ([whole[0]], [whole[7]], whole[12:14]):
        expected = list(stream(model, PROMPT, 30, stop_ids=stop_ids))
        assert list(speculate(model, PROMPT, 30, proposer(kind), stop_ids=stop_ids)) == expected


@pytest.mark.parametrize("length", [0, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("kind", ["lookup", "same"])
def test_length(kind, length, model, proposer):
    expected = list(stream(model, PROMPT, length))
    assert list(speculate(model, PROMPT, length, proposer(kind))) == expected


def test_up_to_the_context_and_not_beyond(tiny, proposer):
    model = tiny("gpt2", n_positions=20)
    expected = list(stream(model, PROMPT, 13))
    for kind in ("lookup", "same"):
        assert list(speculate(model, PROMPT, 13, proposer(kind))) == expected
    with pytest.raises(ValueError, match="context of 20 tokens, got 8 and 14"):
        next(speculate(model, PROMPT, 14, PromptLookup()))


def test_a_draft_model_of_a_shorter_context(tiny, model):
    draft = DraftModel(tiny("gpt2", n_positions=16))
    assert list(speculate(model, PROMPT, 30, draft)) == list(stream(model, PROMPT, 30))
    assert len(draft.propose([1] * 16, 5).tokens) == 1
    assert draft.propose([1] * 17, 5).tokens == []


def test_what_prompt_lookup_proposes():
    lookup = PromptLookup(longest=3, shortest=2)
    assert lookup.propose([1, 2, 3, 4, 1, 2], 3).tokens == [3, 4, 1]
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9], 3).tokens == []
    assert lookup.propose([1, 2, 3, 4, 1, 2, 9, 1, 2], 9).tokens == [9, 1, 2]  # the last time
    longest = PromptLookup(longest=3, shortest=2)
    assert longest.propose([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 1).tokens == [7]


def test_how_a_model_is_its_own_draft(model):
    acceptance = Acceptance()
    proposer = DraftModel(model)
    tokens = list(speculate(model, PROMPT, 25, proposer, draft_tokens=5, acceptance=acceptance))
    # one of the prompt, then six of each pass
    assert (len(tokens), acceptance.tokens, acceptance.passes) == (25, 25, 1 + 4)


def test_acceptance_without_proposals(model):
    class Silent:
        def propose(self, tokens, count):
            return Proposal([])

    acceptance = Acceptance()
    list(speculate(model, PROMPT, 9, Silent(), acceptance=acceptance))
    assert (acceptance.passes, acceptance.tokens) == (9, 9)


DRAWS = 4000
SAMPLINGS = [Sampling(), Sampling(temperature=0.7, top_k=3), Sampling(top_p=0.8)]


def chi_square(drawn, expected):
    """Of counts against probabilities, over its 99.99 % quantile, about."""
    counts = torch.bincount(torch.tensor(drawn), minlength=expected.numel())
    possible = expected > 0
    assert not counts[~possible].any()
    wanted = expected[possible] * len(drawn)
    freedom = max(1, int(possible.sum()) - 1)
    deviation = float(((counts[possible] - wanted) ** 2 / wanted).sum())
    return deviation / (freedom + 5 * (2 * freedom) ** 0.5)


def accepted_tokens(proposer, sampling):
    """The first two tokens (as one number) that ``_accept`` makes of fixed logits."""
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.0, 1.5, 0.0, 0.5], [2.0, 0.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(DRAWS):
        tokens = speculative._accept(logits, proposer.propose([], 2), sampling, generator)
        if len(tokens) < 2:  # as the next pass would go on
            tokens += speculative._accept(logits[1:2], Proposal([]), sampling, generator)
        drawn.append(tokens[0] * 4 + tokens[1])
    first, second = speculative.probabilities(logits, sampling)[:2]
    return chi_square(drawn, (first[:, None] * second).flatten())


@pytest.mark.parametrize("certain", [True, False], ids=["certain", "random"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_drawn_tokens_have_the_models_distribution(certain, sampling):
    assert accepted_tokens(Random(certain), sampling) < 1


@pytest.mark.parametrize("certain", [True, False], ids=["certain", "random"])
def test_the_test_of_the_distribution_sees_what_is_wrong(certain, monkeypatch):
    def always(logits, proposal, sampling, generator):
        return proposal.tokens or [int(logits[0].argmax())]

    monkeypatch.setattr(speculative, "_accept", always)
    assert accepted_tokens(Random(certain), Sampling()) > 5


@pytest.mark.parametrize("certain", [True, False], ids=["certain", "random"])
def test_drawn_texts_have_the_models_distribution(certain, tiny):
    """Three tokens of a vocabulary of 4, by the whole loop."""
    model = tiny(vocab_size=4, num_hidden_layers=1)
    with torch.no_grad():
        model.head.weight *= 0.3
        texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
        logits = model(torch.cat([torch.tensor([[1, 2]]).expand(64, 2), texts], 1))[:, 1:4]
        chances = logits.softmax(-1).gather(-1, texts[..., None])[..., 0].prod(-1)
    drawn = []
    for seed in range(200):
        proposer = Random(certain)
        proposer.generator.manual_seed(1000 + seed)
        a, b, c = speculate(model, [1, 2], 3, proposer, sampling=Sampling(), seed=seed)
        drawn.append(a * 16 + b * 4 + c)
    assert chi_square(drawn, chances) < 1


def test_a_draft_model_draws_what_it_says(tiny):
    model = tiny(vocab_size=4)
    draft = DraftModel(model, Sampling())
    proposal = draft.propose([1, 2], 3)
    assert proposal.drawn_from.shape == (3, 4)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, *proposal.tokens[:2]]]))[0, 1:].softmax(-1)
    torch.testing.assert_close(proposal.drawn_from, expected, atol=1e-5, rtol=1e-5)


def test_the_seed_decides(model):
    def draw(seed):
        proposer = DraftModel(model, Sampling(), seed)
        return list(speculate(model, PROMPT, 20, proposer, sampling=Sampling(), seed=seed))

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens must be at least 1, got 0"),
        ({"sampling": Sampling(repetition_penalty=1.2)}, "repetition_penalty must be 1, got 1.2"),
    ],
    ids=["draft_tokens", "penalty"],
)
def test_refuses(options, message, model):
    with pytest.raises(ValueError, match=message):
        list(speculate(model, PROMPT, 3, PromptLookup(), **options))


def test_refuses_sizes_of_lookups():
    with pytest.raises(ValueError, match=r"shortest must be in 1\.\.longest = 2, got 3"):
        PromptLookup(2, 3)


def test_plain_tokens_are_those_of_generate(model):
    assert list(stream(model, PROMPT, 9)) == generate(model, [PROMPT], 9)[0]
