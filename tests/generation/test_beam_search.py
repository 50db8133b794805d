from itertools import product

import pytest
import torch

from llmos_fast.generation import beam_search, decoder_of, generate
from llmos_fast.testing import assert_close_to_truth

PROMPT = [5, 9, 3]


@pytest.fixture(scope="session")
def peers(tiny, tmp_path_factory):
    """Of some seeds, a model and transformers' model of the same weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pairs = []
    for seed, name in enumerate(("llama", "gpt2", "llama")):
        model = tiny(name, seed)
        folder = tmp_path_factory.mktemp("peer")
        model.save(folder)
        pairs.append((model, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()))
    return pairs


@pytest.mark.parametrize("stop_ids", [[], [7], [7, 9, 30]], ids=str)
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("beams", [1, 2, 3, 4])
def test_equals_transformers(beams, penalty, stop_ids, peers):
    for model, peer in peers:
        found = beam_search(
            decoder_of(model), PROMPT, 9, beams=beams, length_penalty=penalty, stop_ids=stop_ids
        )
        if beams == 1:
            # transformers searches greedily then, without scores
            assert [found[0].tokens] == generate(model, [PROMPT], 9, stop_ids=stop_ids)
            continue
        theirs = peer.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, 3, dtype=torch.int64),
            max_new_tokens=9,
            do_sample=False,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            eos_token_id=stop_ids or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert len(found) == beams
        scores = torch.tensor([hypothesis.score for hypothesis in found])
        expected = theirs.sequences_scores
        assert_close_to_truth(scores, expected, expected.double(), reduction=4096)
        for hypothesis, row in zip(found, theirs.sequences[:, 3:].tolist(), strict=True):
            assert row[: len(hypothesis.tokens)] == hypothesis.tokens
            assert len(hypothesis.tokens) == 9 or hypothesis.tokens[-1] in stop_ids


def continuations(stop_ids, length):
    """Of a vocabulary of 3, all texts that end with a stop token or are ``length`` long."""
    for tokens in product(range(3), repeat=length):
        end = next((i + 1 for i, t in enumerate(tokens) if t in stop_ids), length)
        yield tokens[:end]


@pytest.mark.parametrize("stop_ids", [[], [2], [1, 2]], ids=str)
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_best_of_all(seed, penalty, stop_ids, tiny):
    model = tiny(seed=seed, vocab_size=3)
    scored = {}
    for tokens in set(continuations(stop_ids, 4)):
        with torch.no_grad():
            logits = model(torch.tensor([[1, 0, *tokens]])).log_softmax(-1)[0, 1:]
        total = sum(float(logits[i, t]) for i, t in enumerate(tokens))
        scored[tokens] = total / len(tokens) ** penalty
    expected = sorted(scored.values(), reverse=True)
    found = beam_search(
        decoder_of(model), [1, 0], 4, beams=81, length_penalty=penalty, stop_ids=stop_ids
    )
    assert [h.score for h in found] == pytest.approx(expected, abs=1e-4)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(scored[tuple(hypothesis.tokens)], abs=1e-4)


def test_every_token_may_end_a_text(tiny):
    model = tiny(vocab_size=3)
    found = beam_search(decoder_of(model), [1], 4, beams=2, stop_ids=[0, 1, 2])
    assert [len(hypothesis.tokens) for hypothesis in found] == [1, 1]


def test_length_zero_and_one(tiny):
    model = tiny()
    assert beam_search(decoder_of(model), PROMPT, 0) == []
    logits = model.next_logits(torch.tensor([PROMPT]))[0]
    best = logits.topk(4).indices.tolist()
    assert [h.tokens for h in beam_search(decoder_of(model), PROMPT, 1)] == [[t] for t in best]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"prompts must be some, of one token or more, got \[0\]"),
        ([1], {"beams": 0}, "beams must be at least 1, got 0"),
        ([1] * 512, {}, "fit the model's context of 512"),
    ],
    ids=["prompt", "beams", "context"],
)
def test_refuses(prompt, options, message, tiny):
    with pytest.raises(ValueError, match=message):
        beam_search(decoder_of(tiny()), prompt, 3, **options)
