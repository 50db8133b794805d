import pytest
import torch

from llmos_fast.generation import GREEDY, Sampling, sample
from llmos_fast.generation.sampling import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize,
    probabilities,
)

PROBABILITIES = torch.tensor([0.5, 0.1, 0.3, 0.06, 0.04])
LOGITS = PROBABILITIES.log()
DRAWS = 20000


def kept(logits):
    return logits.isfinite().nonzero().flatten().tolist()


def frequencies(sampling):
    drawn = sample(LOGITS.expand(DRAWS, 5), sampling, torch.Generator().manual_seed(0))
    return torch.bincount(drawn.flatten(), minlength=5) / DRAWS


def assert_distribution(sampling, expected):
    """Each frequency within five standard deviations of its binomial."""
    expected = torch.tensor(expected)
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((frequencies(sampling) - expected).abs() <= 5 * deviation).all()


def test_temperature_one_draws_the_softmax():
    assert_distribution(Sampling(), PROBABILITIES.tolist())


def test_temperature_sharpens():
    squared = PROBABILITIES**2
    assert_distribution(Sampling(temperature=0.5), (squared / squared.sum()).tolist())


def test_top_k_draws_the_rest_in_proportion():
    assert_distribution(Sampling(top_k=2), [0.625, 0, 0.375, 0, 0])


def test_top_p_draws_the_rest_in_proportion():
    assert_distribution(Sampling(top_p=0.75), [0.625, 0, 0.375, 0, 0])


@pytest.mark.parametrize(
    ("k", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [0]), (3, [0, 1, 2]), (9, [0, 1, 2, 3, 4])]
)
def test_keep_top_k(k, expected):
    assert kept(keep_top_k(LOGITS, k)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, [0]), (0.6, [0, 2]), (0.85, [0, 1, 2]), (1.0, [0, 1, 2, 3, 4])]
)
def test_keep_top_p(p, expected):
    assert kept(keep_top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.0, [0, 1, 2, 3, 4]), (0.1, [0, 1, 2, 3]), (0.5, [0, 2]), (1.0, [0])],
)
def test_keep_min_p(p, expected):
    assert kept(keep_min_p(LOGITS, p)) == expected


def test_min_p_draws_the_rest_in_proportion():
    assert_distribution(Sampling(min_p=0.5), [0.625, 0, 0.375, 0, 0])


def test_penalty_makes_what_occurred_less_likely():
    logits, seen = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([True, True, False, False])
    assert penalize(logits, seen, 4.0).tolist() == [0.5, -8.0, 2.0, -2.0]
    assert penalize(logits, seen, 1.0).tolist() == logits.tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.5),
        Sampling(1.6, top_k=9, min_p=0.3),
        Sampling(0.4, top_p=0.6, repetition_penalty=0.8),
        Sampling(2.0, min_p=0.2),
    ],
    ids=str,
)
def test_equals_the_processors_of_transformers(sampling):
    """Penalty, temperature, top k, top p and min p, in this order."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, tokens = torch.randn(3, 50) * 3, torch.randint(50, (3, 12))
    s = sampling
    steps = [process.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)]
    steps += [process.TemperatureLogitsWarper(s.temperature)]
    steps += [process.TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [process.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [process.MinPLogitsWarper(s.min_p)] if s.min_p else []
    expected = process.LogitsProcessorList(steps)(tokens, logits).softmax(-1)
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, tokens, True)
    found = probabilities(penalize(logits, seen, s.repetition_penalty), s)
    torch.testing.assert_close(found, expected)


def test_greedy():
    rows = torch.stack([LOGITS, LOGITS.flip(0)])
    assert sample(rows, GREEDY).tolist() == [[0], [4]]


def test_half_precision_logits():
    assert sample(LOGITS[None].bfloat16(), Sampling(top_p=0.4)).tolist() == [[0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"min_p": -0.1}, r"min_p must be in 0\.\.1, got -0.1"),
        ({"min_p": 1.1}, r"min_p must be in 0\.\.1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be positive, got inf"),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)
