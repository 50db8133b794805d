import pytest
import torch

from llmos_fast.generation import CachedDecoder, Conversation, Sampling, generate

pytest.importorskip("jinja2")


@pytest.fixture
def steps(monkeypatch):
    """The tokens of each ``CachedDecoder.step``."""
    read, whole_step = [], CachedDecoder.step

    def step(self, tokens):
        read.append(tokens[0].tolist())
        return whole_step(self, tokens)

    monkeypatch.setattr(CachedDecoder, "step", step)
    return read


def answer(conversation, question, length=12):
    return "".join(conversation.ask(question, length))


def afresh(talker, messages, length=12, **options):
    """(ids of the dialogue, the tokens that follow it)."""
    model, tokenizer = talker
    prompt = tokenizer.encode(tokenizer.chat(messages), special=False)
    return prompt, generate(model, [prompt], length, stop_ids=tokenizer.end_ids, **options)[0]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling()], ids=["greedy", "drawn"]
)
def test_answers_are_those_of_the_whole_dialogue(sampling, system, talker):
    model, tokenizer = talker
    conversation = Conversation(
        CachedDecoder(model), tokenizer, sampling=sampling, seed=5, system=system
    )
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, question in enumerate(["Hi", "So what?", "Why?"]):
        messages.append({"role": "user", "content": question})
        _, tokens = afresh(talker, messages, sampling=sampling, seed=5 + number)
        expected = tokenizer.decode(tokens)
        assert answer(conversation, question) == expected
        messages.append({"role": "assistant", "content": expected})
        assert conversation.messages == messages


def test_only_what_is_new_is_read(talker, steps):
    model, tokenizer = talker
    conversation = Conversation(CachedDecoder(model), tokenizer)
    first = answer(conversation, "Hi")
    known, said = afresh(talker, conversation.messages[:1])
    assert tokenizer.decode(said) == first
    steps.clear()
    answer(conversation, "So what?")
    read, counted = list(steps), len(steps)
    prompt, said_then = afresh(talker, conversation.messages[:3])
    # no pass has read the last token of the first answer
    assert read[0] == prompt[len(known) + len(said) - 1 :]
    assert [tokens for (tokens,) in read[1:]] == said_then[:-1]
    assert counted == len(said_then)


def test_a_stop_string_ends_an_answer(talker):
    model, tokenizer = talker
    whole = answer(Conversation(CachedDecoder(model), tokenizer), "Hi", 30)
    stop = whole[5:7]
    conversation = Conversation(CachedDecoder(model), tokenizer, stop=[stop])
    assert answer(conversation, "Hi", 30) == whole[: whole.index(stop)]
    assert conversation.messages[-1]["content"] == whole[: whole.index(stop)]


def test_an_end_token_ends_an_answer(talker):
    model, tokenizer = talker
    _, said = afresh(talker, [{"role": "user", "content": "Hi"}])
    with torch.no_grad():  # a little more likely than what would come fifth
        model.head.weight[tokenizer.end_id] = 1.01 * model.head.weight[said[4]]
    first = said.index(said[4])
    conversation = Conversation(CachedDecoder(model), tokenizer)
    assert answer(conversation, "Hi") == tokenizer.decode(said[:first])
    assert conversation.messages[-1]["role"] == "assistant"


def test_an_abandoned_answer_is_forgotten(talker):
    model, tokenizer = talker
    conversation = Conversation(CachedDecoder(model), tokenizer)
    answer(conversation, "Hi")
    before = list(conversation.messages)
    pieces = conversation.ask("Tell me more", 12)
    for _ in range(4):
        next(pieces)
    pieces.close()
    assert conversation.messages == before
    asked = [*before, {"role": "user", "content": "Why?"}]
    assert answer(conversation, "Why?") == tokenizer.decode(afresh(talker, asked)[1])


def test_the_last_answer_fills_the_context(talker):
    model, tokenizer = talker
    decoder = CachedDecoder(model)
    conversation = Conversation(decoder, tokenizer)
    with torch.no_grad():
        model.head.weight[tokenizer.end_id] = 0.0
    answer(conversation, "Hi", 1000)
    assert len(decoder.tokens[0]) == 256
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="fit the model's context of 256 tokens"):
        answer(conversation, "Hi again")
    assert conversation.messages == before


def test_what_the_template_refuses(talker):
    model, tokenizer = talker
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    conversation = Conversation(CachedDecoder(model), tokenizer)
    with pytest.raises(ValueError, match="no user"):
        answer(conversation, "Hi")
    assert conversation.messages == []
