"""Tokens and text from a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from llmos_fast.data import PretrainedTokenizer, Tokenizer
from llmos_fast.generation.decoder import Decoder, Seq2SeqDecoder, decoder_of
from llmos_fast.generation.sampling import GREEDY, Sampling, penalize, sample
from llmos_fast.generation.stopping import StopTexts
from llmos_fast.models import EncoderDecoder, LanguageModel


class Generation:
    """Sequences that grow together; iterating gives {sequence: its next token} for each step.

    prompts:       one sequence each, of any lengths; or ``num_sequences`` each, one after another,
                   which share the prompt's computation and memory
    length:        tokens that each may get
    stop_ids:      tokens that end a sequence; they count as its last one
    banned:        tokens that are never produced
    seed:          the same one gives the same tokens for the same prompts

    A sequence also ends where ``finish`` is called for it.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        length: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        num_sequences: int = 1,
        stop_ids: Collection[int] = (),
        banned: Sequence[int] = (),
    ):
        check_prompts(prompts, length, decoder.max_length)
        if num_sequences < 1:
            raise ValueError(f"generate: num_sequences must be at least 1, got {num_sequences}")
        self._decoder, self._length, self._sampling = decoder, length, sampling
        self._stop_ids, self._banned = frozenset(stop_ids), list(banned)
        self._prompts = [list(prompt) for prompt in prompts]
        self._num_sequences, self._seed = num_sequences, seed
        self._active = list(range(len(self._prompts) * num_sequences))
        self._finished: set[int] = set()

    def finish(self, sequence: int) -> None:
        """Let ``sequence`` get no more tokens."""
        self._finished.add(sequence)

    @torch.no_grad()
    def __iter__(self) -> Iterator[dict[int, int]]:
        if self._length == 0:
            return
        logits = self._decoder.read(self._prompts)
        if self._num_sequences > 1:
            rows = [i // self._num_sequences for i in self._active]
            self._decoder.keep(rows)
            logits = logits[rows]
        generator = torch.Generator(logits.device).manual_seed(self._seed)
        seen = self._seen(logits)
        for step in range(self._length):
            tokens = self._choose(logits, seen, generator)
            chosen = dict(zip(self._active, tokens[:, 0].tolist(), strict=True))
            self._finished |= {i for i, token in chosen.items() if token in self._stop_ids}
            yield chosen
            kept = [row for row, i in enumerate(self._active) if i not in self._finished]
            if not kept or step + 1 == self._length:
                return
            if len(kept) < len(self._active):
                self._active = [self._active[row] for row in kept]
                self._decoder.keep(kept)
                tokens, seen = tokens[kept], None if seen is None else seen[kept]
            logits = self._decoder.step(tokens)[:, -1]

    def _seen(self, logits: Tensor) -> Tensor | None:
        """Bool[batch ntoken], where a token has occurred; None where nobody asks."""
        if self._sampling.repetition_penalty == 1:
            return None
        seen = torch.zeros_like(logits, dtype=torch.bool)
        if isinstance(self._decoder, Seq2SeqDecoder):
            return seen  # the prompt is another text
        for row, sequence in enumerate(self._active):
            seen[row, self._prompts[sequence // self._num_sequences]] = True
        return seen

    def _choose(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator) -> Tensor:
        if self._banned:
            logits[:, self._banned] = -torch.inf
        if seen is not None:
            logits = penalize(logits, seen, self._sampling.repetition_penalty)
        tokens = sample(logits, self._sampling, generator)
        if seen is not None:
            seen.scatter_(1, tokens, True)
        return tokens


def generate(
    model: LanguageModel | EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    num_sequences: int = 1,
    stop_ids: Collection[int] = (),
    banned: Sequence[int] = (),
    context: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Continue ``prompts`` by up to ``length`` tokens each; the model is put in evaluation mode.

    prompts:     token ids, of any lengths; the sources where the model is an encoder-decoder
    context:     tokens that a model without a cache looks back
    cache_dtype: of keys and values: None (the model's) or torch.int8
    returns:     the new tokens of each sequence, ``num_sequences`` for a prompt one after another

    The other arguments are those of ``Generation``. Raises ValueError that names the argument.
    """
    decoder = decoder_of(model, context=context, cache_dtype=cache_dtype)
    generation = Generation(
        decoder,
        prompts,
        length,
        sampling=sampling,
        seed=seed,
        num_sequences=num_sequences,
        stop_ids=stop_ids,
        banned=banned,
    )
    sequences: list[list[int]] = [[] for _ in range(len(prompts) * num_sequences)]
    for step in generation:
        for i, token in step.items():
            sequences[i].append(token)
    return sequences


def stream(
    model: LanguageModel | EncoderDecoder,
    prompt: Sequence[int],
    length: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    banned: Sequence[int] = (),
    context: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Iterator[int]:
    """The tokens after one prompt, each as soon as it is known; a stop token is not given."""
    decoder = decoder_of(model, context=context, cache_dtype=cache_dtype)
    generation = Generation(
        decoder, [prompt], length, sampling=sampling, seed=seed, stop_ids=stop_ids, banned=banned
    )
    for step in generation:
        if step[0] in stop_ids:
            return
        yield step[0]


def generate_text(
    model: LanguageModel | EncoderDecoder,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str] = (),
    unknown: str = "map",
    allow_unknown: bool = False,
    context: int | None = None,
) -> str:
    """Continue ``prompt`` by up to ``length`` tokens; return the prompt with its continuation.

    stop:          strings that end the text
    unknown:       words of the prompt outside the vocabulary: "map" to ``<unk>``, or "raise"
                   ValueError
    allow_unknown: whether ``<unk>`` may be produced

    An empty prompt starts at the beginning of a line.
    """
    ids = encode_prompt(tokenizer, prompt, unknown)
    tokens = stream(
        model,
        ids,
        length,
        sampling=sampling,
        seed=seed,
        stop_ids=stop_ids_of(tokenizer),
        banned=banned_ids(tokenizer, allow_unknown),
        context=context,
    )
    read = () if isinstance(model, EncoderDecoder) else ids
    return "".join(stream_text(tokens, tokenizer, stop, read)).strip()


def stream_text(
    tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = (), read: Sequence[int] = ()
) -> Iterator[str]:
    """Text of ``read`` and then of ``tokens`` as it becomes final, up to the first ``stop``."""
    decoder, stopping = tokenizer.stream(), StopTexts(stop)
    yield "".join([decoder.push(token) for token in read])
    for token in tokens:
        yield stopping.push(decoder.push(token))
        if stopping.stopped:
            return
    yield stopping.push(decoder.flush())
    yield stopping.flush()


def encode_prompt(tokenizer: Tokenizer, prompt: str, unknown: str = "map") -> list[int]:
    """Ids of ``prompt``; of the end of a line, or of the beginning of a text, where it is empty."""
    ids = tokenizer.encode(prompt, unknown)
    if ids:
        return ids
    begin = tokenizer.begin_id if isinstance(tokenizer, PretrainedTokenizer) else None
    start = tokenizer.end_id if begin is None else begin
    if start is None:
        raise ValueError("generate: prompt must not be empty for a model without a begin token")
    return [start]


def stop_ids_of(tokenizer: Tokenizer) -> Sequence[int]:
    """Tokens that end a text: of a corpus, whose lines go on, there are none."""
    return tokenizer.end_ids if isinstance(tokenizer, PretrainedTokenizer) else ()


def banned_ids(tokenizer: Tokenizer, allow_unknown: bool) -> Sequence[int]:
    """The unknown word's, where it may not be produced."""
    return () if allow_unknown or tokenizer.unknown_id is None else (tokenizer.unknown_id,)


def check_prompts(prompts: Sequence[Sequence[int]], length: int, limit: int | None) -> None:
    """Raise ValueError for what cannot be continued; ``limit`` is the model's context."""
    sizes = [len(prompt) for prompt in prompts]
    if not sizes or min(sizes) == 0:
        raise ValueError(f"generate: prompts must be some, of one token or more, got {sizes}")
    if length < 0:
        raise ValueError(f"generate: length must be at least 0, got {length}")
    # no pass reads the last token
    if limit is not None and max(sizes) + max(length, 1) - 1 > limit:
        raise ValueError(
            f"generate: prompt and length must fit the model's context of {limit} tokens, "
            f"got {max(sizes)} and {length}"
        )
