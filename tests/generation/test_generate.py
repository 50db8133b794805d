import pytest
import torch

from llmos_fast.data import build_vocab
from llmos_fast.generation import (
    GREEDY,
    Generation,
    Sampling,
    beam_search,
    decoder_of,
    generate,
    generate_text,
    stream,
    stream_text,
)
from llmos_fast.models import LanguageModel, TransformerModel
from llmos_fast.testing import assert_close_to_truth

VOCABULARY = build_vocab(["red green blue"])
PROMPTS = [[5, 9, 3], [11], [7, 7, 2, 60, 41, 8, 30]]
CAUSAL = ["llama", "gpt2", "mistral", "qwen3"]


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
    assert generate(model, [[1], [3]], 4, context=3) == [[2, 3, 4, 0], [4, 0, 1, 2]]
    assert model.widths == [1, 2, 3, 3]


def test_prompts_of_different_lengths_without_a_cache():
    assert generate(CountsUp(), [[1], [2, 3, 4]], 2) == [[2, 3], [0, 1]]
    model = small_model()
    prompts = [[1, 2], [3], [4, 1, 2]]
    together = generate(model, prompts, 6, context=4)
    assert together == [generate(model, [prompt], 6, context=4)[0] for prompt in prompts]


def test_banned_tokens_are_never_produced():
    (out,) = generate(small_model(), [[1]], 200, sampling=Sampling(), context=4, banned=[0, 2])
    assert set(out) == {1, 3, 4}


@pytest.mark.parametrize("name", ["window", "llama"])
def test_the_seed_decides(name, tiny):
    model = small_model() if name == "window" else tiny(name)

    def draw(seed):
        return generate(model, [[2], [3, 1]], 30, sampling=Sampling(), seed=seed, context=8)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=["fp32", "int8"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_batch_is_its_prompts_one_at_a_time(name, cache_dtype, tiny):
    model = tiny(name)
    together = generate(model, PROMPTS, 20, cache_dtype=cache_dtype)
    alone = [generate(model, [prompt], 20, cache_dtype=cache_dtype)[0] for prompt in PROMPTS]
    assert together == alone


@pytest.mark.parametrize("name", CAUSAL)
def test_the_cache_gives_what_is_recomputed(name, tiny):
    model = tiny(name)
    prompts = [[t % 61 for t in range(60)], [3]]
    decoder = decoder_of(model)
    logits = decoder.read(prompts)
    for _ in range(10):
        for row, tokens in enumerate(decoder.tokens):
            expected = model.next_logits(torch.tensor([tokens]))[0]
            assert_close_to_truth(logits[row], expected, expected.double(), reduction=4096)
        logits = decoder.step(logits.argmax(-1, keepdim=True))[:, -1]


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_greedy_equals_transformers(name, penalty, tiny, their_tokens):
    model = tiny(name)
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty)
    expected = their_tokens(model, PROMPTS[2], 20, repetition_penalty=penalty)
    assert generate(model, PROMPTS, 20, sampling=sampling)[2] == expected


def test_t5_sources_of_different_lengths(tiny):
    model = tiny("t5")
    together = generate(model, PROMPTS, 12)
    assert together == [generate(model, [source], 12)[0] for source in PROMPTS]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_t5_beams_equal_transformers(penalty, tiny, their_tokens):
    model = tiny("t5", seed=1)
    options = {"num_beams": 3, "length_penalty": penalty, "eos_token_id": 7}
    expected = their_tokens(model, PROMPTS[2], 10, **options)
    found = beam_search(
        decoder_of(model), PROMPTS[2], 10, beams=3, length_penalty=penalty, stop_ids=[7]
    )
    assert found[0].tokens == expected


@pytest.mark.parametrize("name", ["llama", "t5", "window"])
def test_several_sequences_of_a_prompt(name, tiny):
    model = CountsUp() if name == "window" else tiny(name)
    texts = generate(model, [[1], [2, 3]], 5, sampling=Sampling(9.0), num_sequences=8)
    assert len(texts) == 16
    assert all(len(text) == 5 for text in texts)
    assert len({text[0] for text in texts[:8]}) > 1
    assert len({text[0] for text in texts[8:]}) > 1
    greedy = generate(model, [[1], [2, 3]], 5, num_sequences=2)
    first, second = generate(model, [[1], [2, 3]], 5)
    assert greedy == [first, first, second, second]


def test_sequences_share_the_pages_of_their_prompt(tiny):
    decoder = decoder_of(tiny())

    def pages():
        return sum(owners > 0 for owners in decoder.cache._owners)

    prompt = [t % 61 for t in range(130)]
    steps = iter(Generation(decoder, [prompt], 3, sampling=Sampling(), num_sequences=5))
    next(steps)
    assert pages() == 3
    next(steps)
    assert pages() == 2 + 5  # the last page was not full: each has its own


def test_sequences_end_at_stop_ids(tiny):
    model = tiny()
    whole = generate(model, PROMPTS, 20)
    stop_ids = {whole[0][4], whole[1][9]}
    ends = [next((i + 1 for i, t in enumerate(w) if t in stop_ids), 20) for w in whole]
    assert len(set(ends)) > 1
    expected = [tokens[:end] for tokens, end in zip(whole, ends, strict=True)]
    assert generate(model, PROMPTS, 20, stop_ids=stop_ids) == expected
    streamed = list(stream(model, PROMPTS[0], 20, stop_ids=stop_ids))
    assert streamed == expected[0][:-1]


def test_what_occurred_stays_with_its_sequence_when_others_end(tiny):
    model, sampling = tiny(), Sampling(temperature=0.0, repetition_penalty=1.7)
    stop_ids = [generate(model, PROMPTS, 20, sampling=sampling)[0][2]]
    options = {"sampling": sampling, "stop_ids": stop_ids}
    together = generate(model, PROMPTS, 20, **options)
    assert together == [generate(model, [prompt], 20, **options)[0] for prompt in PROMPTS]


def test_a_sequence_that_is_finished_gets_no_more(tiny):
    model = tiny()
    whole = generate(model, PROMPTS, 6)
    generation = Generation(decoder_of(model), PROMPTS, 6)
    texts = [[], [], []]
    for number, step in enumerate(generation):
        for i, token in step.items():
            texts[i].append(token)
        if number == 1:
            generation.finish(1)
    assert texts == [whole[0], whole[1][:2], whole[2]]


@pytest.mark.parametrize("name", ["llama", "t5", "window"])
def test_no_token_and_one(name, tiny):
    model = CountsUp() if name == "window" else tiny(name)
    assert generate(model, [[1], [2]], 0) == [[], []]
    one, two = generate(model, [[1], [2]], 1), generate(model, [[1], [2]], 2)
    assert one == [tokens[:1] for tokens in two]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("prompt", "length"), [(16, 1), (10, 7), (1, 16)])
def test_up_to_the_context_and_not_beyond(name, prompt, length, tiny):
    limit = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[name]
    model = tiny(name, **{limit: 16})
    assert len(generate(model, [[3] * prompt], length)[0]) == length
    with pytest.raises(ValueError, match="fit the model's context of 16 tokens, got"):
        generate(model, [[3], [3] * prompt], length + 1)


@pytest.mark.parametrize(
    ("prompts", "length", "options", "message"),
    [
        ([[]], 1, {}, r"prompts must be some, of one token or more, got \[0\]"),
        ([[1], []], 1, {}, r"got \[1, 0\]"),
        ([], 1, {}, r"got \[\]"),
        ([[1]], -1, {}, "length must be at least 0, got -1"),
        ([[1]], 1, {"context": 0}, "context must be at least 1, got 0"),
        ([[1]], 1, {"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
    ],
    ids=str,
)
def test_refuses(prompts, length, options, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(), prompts, length, **options)


def test_a_token_comes_before_the_next_is_computed():
    model = CountsUp()
    tokens = stream(model, [1], 3)
    for number, token in enumerate(tokens, 1):
        assert token == number + 1
        assert len(model.widths) == number


def text(prompt, length, **policy):
    return generate_text(CountsUp(), VOCABULARY, prompt, length, context=4, **policy)


def test_text():
    assert text("red", 2) == "red green blue"
    assert text("", 2) == "red green"  # <eos> is 1, red is 2
    assert text("red", 2, stop=["blue"]) == "red green"


def test_text_piece_by_piece():
    pieces = list(stream_text([3, 4, 3], VOCABULARY, ["blue green"], [2]))
    assert "".join(pieces).strip() == "red green"
    assert "".join(stream_text(iter([3, 4]), VOCABULARY, ["blue green"])).strip() == "green blue"


def test_unknown_words_of_the_prompt():
    assert text("zebra", 0) == "<unk>"
    with pytest.raises(ValueError, match="zebra"):
        text("zebra", 0, unknown="raise")


def test_unknown_is_produced_only_where_asked():
    assert text("blue", 1, allow_unknown=True) == "blue <unk>"
    assert "<unk>" not in text("blue", 1)


def test_greedy_is_the_default():
    assert generate(CountsUp(), [[1]], 3) == generate(CountsUp(), [[1]], 3, sampling=GREEDY)
