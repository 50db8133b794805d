import pytest
import torch

from llmos_fast.generation import CachedDecoder, decoder, generate
from llmos_fast.nn import quantize_
from llmos_fast.testing import assert_close_to_truth

PROMPTS = [[t % 61 for t in range(50)], [3, 4, 5]]
# case: (model, changes of its config, scheme, dtype, dtype of the cache)
CASES = {
    "gpt2": ("gpt2", {}, None, None, None),
    "llama": ("llama", {}, None, None, None),
    "qwen3": ("qwen3", {}, None, None, None),
    "mistral": ("mistral", {}, None, None, None),
    "int4": ("llama", {}, "int4", None, None),
    "int8": ("llama", {}, "int8", None, None),
    "gpt2 int4": ("gpt2", {}, "int4", None, None),
    "bf16": ("llama", {}, None, torch.bfloat16, None),
    "int8 cache": ("llama", {}, None, None, torch.int8),
    "bf16, int8 cache": ("gpt2", {}, None, torch.bfloat16, torch.int8),
}


@pytest.fixture
def make(tiny):
    """make(case): its model and the dtype of its cache."""

    def made(case):
        name, changes, scheme, dtype, cache_dtype = CASES[case]
        model = tiny(name, **changes)
        if scheme is not None:
            quantize_(model, scheme, 32)
        return model.to(dtype), cache_dtype

    return made


@pytest.fixture
def recordings(monkeypatch):
    """One entry for each recording that is made: its tokens' shape."""
    shapes, captured = [], decoder.Captured

    def counted(function, x, positions):
        shapes.append(tuple(positions.shape))
        return captured(function, x, positions)

    monkeypatch.setattr(decoder, "Captured", counted)
    return shapes


def eager(model, cache_dtype=None):
    unrecorded = CachedDecoder(model, cache_dtype)
    unrecorded.uncaptured = "for comparison"
    return unrecorded


def step(tokens, *decoders):
    """The same logits, to the bit, of all decoders."""
    first, *others = [d.step(torch.tensor(tokens)).clone() for d in decoders]
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_equal_eager_ones(case, make, recordings):
    """Across two pages, one token at a time and several."""
    model, cache_dtype = make(case)
    both = CachedDecoder(model, cache_dtype), eager(model, cache_dtype)
    assert torch.equal(*[d.read(PROMPTS) for d in both])
    for number in range(80):
        several = 1 + 4 * (number % 9 == 0)
        step([[(number * 7 + i) % 61 for i in range(several)]] * 2, *both)
    assert both[0].uncaptured is None
    assert both[0].tokens == both[1].tokens
    assert {(2, 1), (2, 5)} == set(recordings)
    assert len(recordings) < 12


def test_recorded_again_where_the_cache_moved(make, recordings):
    model, _ = make("llama")
    both = CachedDecoder(model), eager(model)
    for d in both:
        d.read(PROMPTS)
    step([[1], [2]], *both)
    step([[3], [4]], *both)
    assert len(recordings) == 1
    for d in both:
        d.reserve(4096)
    step([[5], [6]], *both)
    assert len(recordings) == 2
    for d in both:
        d.keep([1, 0])  # as many sequences: the same tensors hold the new order
    step([[5], [6]], *both)
    assert len(recordings) == 2
    for d in both:
        d.keep([0, 1, 1])
    step([[5], [6], [7]], *both)
    assert recordings[2:] == [(3, 1)]


@pytest.mark.parametrize("case", ["gated inner size", "hook"])
def test_what_cannot_be_recorded_is_right_all_the_same(case, tiny):
    model = tiny(intermediate_size=72 if case == "gated inner size" else 64)
    if case == "gated inner size":
        quantize_(model, "int4", 32)
    else:
        model.stack.register_forward_hook(lambda module, inputs, x: x * 2)
    prompts = [[5, 9, 3], [11]]
    recorded = CachedDecoder(model)
    logits = recorded.read(prompts)
    for _ in range(5):
        for row, tokens in enumerate(recorded.tokens):
            with torch.no_grad():
                expected = model.next_logits(torch.tensor([tokens]))[0]
            assert_close_to_truth(logits[row], expected, expected.double(), reduction=4096)
        logits = recorded.step(logits.argmax(-1, keepdim=True))[:, -1]
    assert "must consist of native ops" in recorded.uncaptured


@pytest.mark.parametrize(
    ("known", "prompt", "kept"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6], 4),
        ([1, 2, 3, 4], [1, 2, 9, 9], 2),
        ([1, 2, 3, 4], [1, 2, 3, 4], 3),
        ([1, 2, 3, 4], [1, 2], 1),
        ([1, 2, 3, 4], [9], 0),
        (list(range(60)) * 3, list(range(60)) * 2 + [7], 120),
        ([5], list(range(60)) * 2, 0),
    ],
)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=["fp32", "int8"])
def test_reading_goes_on_from_what_is_common(known, prompt, kept, cache_dtype, tiny, monkeypatch):
    model = tiny("gpt2")
    resumed, afresh = CachedDecoder(model, cache_dtype), CachedDecoder(model, cache_dtype)
    resumed.read([known])
    steps, whole_step = [], resumed.step
    monkeypatch.setattr(resumed, "step", lambda t: steps.append(t.tolist()) or whole_step(t))
    # of int8, a prompt attends to its own keys before they are rounded
    near = {"atol": 1e-4, "rtol": 1e-4} if cache_dtype is None else {"atol": 0.2, "rtol": 0.05}
    torch.testing.assert_close(resumed.read([prompt]), afresh.read([prompt]), **near)
    assert steps == [[prompt[kept:]]]
    assert resumed.tokens == [prompt]
    following = resumed.step(torch.tensor([[8]])), afresh.step(torch.tensor([[8]]))
    torch.testing.assert_close(*following, **near)


def test_several_sequences_are_not_read_twice(tiny):
    recorded = CachedDecoder(tiny())
    recorded.read([[1], [2]])
    with pytest.raises(ValueError, match="prompts must be one to go on from one sequence, got 1 a"):
        recorded.read([[1]])


def test_rewind(tiny):
    model = tiny()
    rewound, other = CachedDecoder(model), CachedDecoder(model)
    for d in (rewound, other):
        d.read(PROMPTS)
    for number in range(40):  # the first sequence goes on to its second page
        rewound.step(torch.tensor([[number], [number]]))
    rewound.rewind([52, 4])
    other.step(torch.tensor([[0, 1], [0, 30]]))
    other.rewind([52, 4])
    assert rewound.tokens == other.tokens == [[*PROMPTS[0], 0, 1], [*PROMPTS[1], 0]]
    assert torch.equal(*[d.step(torch.tensor([[9], [8]])) for d in (rewound, other)])


@pytest.mark.parametrize("case", ["llama", "int8 cache", "bf16"])
def test_copies_of_a_sequence_part(case, make):
    """They share pages until they are written, and never see what the others wrote."""
    model, cache_dtype = make(case)
    shared = CachedDecoder(model, cache_dtype)
    shared.read(PROMPTS)
    shared.keep([0, 1, 0, 0])
    apart = CachedDecoder(model, cache_dtype)
    apart.read([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]])
    for number in range(20):
        tokens = [[number], [number + 1], [number + 2], [number + 3]]
        step(tokens, shared, apart)
    for d in (shared, apart):
        d.keep([2, 2, 0])
    step([[1], [2], [3]], shared, apart)
    assert shared.tokens == apart.tokens


def test_the_model_is_put_in_evaluation_mode(tiny):
    model = tiny("gpt2")
    expected = generate(model, [[1, 2]], 8)
    assert generate(model.train(), [[1, 2]], 8) == expected
    assert not model.training
