"""``llmos-fast generate``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
from typer import Option

from llmos_fast.commands.opened import Opened, open_model
from llmos_fast.commands.options import (
    DEFAULT_DEVICE,
    AnyModel,
    Device,
    GroupSize,
    Int8Cache,
    MinP,
    RepetitionPenalty,
    Scheme,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    use_machine,
)
from llmos_fast.commands.terminal import console
from llmos_fast.generation import (
    DraftModel,
    Generation,
    PromptLookup,
    Sampling,
    banned_ids,
    beam_search,
    decoder_of,
    encode_prompt,
    speculate,
    stop_ids_of,
    stream_text,
)
from llmos_fast.generation.speculative import Proposer
from llmos_fast.models import CausalLM, EncoderDecoder


def generate(
    model: AnyModel,
    prompt: Annotated[str, Option(help="Text to continue; empty: from the start of a line.")] = "",
    length: Annotated[int, Option(help="Tokens to add.")] = 50,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    sequences: Annotated[int, Option(help="Texts to draw from one prompt.", min=1)] = 1,
    beams: Annotated[int, Option(help="Search for the likeliest text with so many.", min=1)] = 1,
    length_penalty: Annotated[float, Option(help="Of beams: above 0 favours long texts.")] = 1.0,
    draft: Annotated[
        str | None,
        Option(help="Who proposes tokens: prompt (text that repeats itself), or a smaller model."),
    ] = None,
    scheme: Scheme = None,
    group_size: GroupSize = 32,
    int8_cache: Int8Cache = False,
    unknown: Annotated[
        str, Option(help="Unknown words of the prompt: map (to <unk>) or raise (an error).")
    ] = "map",
    allow_unknown: Annotated[
        bool, Option("--allow-unknown", help="Let the model produce <unk>.")
    ] = False,
    device: Device = DEFAULT_DEVICE,
    threads: Threads = 0,
) -> None:
    """Continue a text."""
    if (sequences > 1) + (beams > 1) + (draft is not None) > 1:
        raise ValueError("--beams, --draft and --sequences exclude one another")
    use_machine(device, threads)
    opened = open_model(model, scheme, group_size)
    opened.model.to(device)
    ids = encode_prompt(opened.tokenizer, prompt, unknown)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    cache_dtype = torch.int8 if int8_cache else None
    decoder = decoder_of(opened.model, context=opened.context, cache_dtype=cache_dtype)
    stop_ids = stop_ids_of(opened.tokenizer)
    if beams > 1:
        found = beam_search(
            decoder, ids, length, beams=beams, length_penalty=length_penalty, stop_ids=stop_ids
        )
        print_texts(opened, ids, [found[0].tokens if found else []], stop or [])
        return
    if draft is not None:
        proposer = _proposer(draft, sampling, seed, opened)
        tokens = speculate(
            opened.model,  # type: ignore[arg-type]
            ids,
            length,
            proposer,
            sampling=sampling,
            seed=seed,
            stop_ids=stop_ids,
            cache_dtype=cache_dtype,
        )
        print_texts(opened, ids, [tokens], stop or [])
        return
    generation = Generation(
        decoder,
        [ids],
        length,
        sampling=sampling,
        seed=seed,
        num_sequences=sequences,
        stop_ids=stop_ids,
        banned=banned_ids(opened.tokenizer, allow_unknown),
    )
    if sequences == 1:
        print_texts(opened, ids, [(step[0] for step in generation)], stop or [])
        return
    texts: list[list[int]] = [[] for _ in range(sequences)]
    for step in generation:
        for i, token in step.items():
            texts[i].append(token)
    print_texts(opened, ids, texts, stop or [])


def _proposer(draft: str, sampling: Sampling, seed: int, opened: Opened) -> Proposer:
    if not isinstance(opened.model, CausalLM):
        raise ValueError(f"--draft needs a decoder-only model, got a {type(opened.model).__name__}")
    if draft == "prompt":
        return PromptLookup()
    small = open_model(Path(draft)).model
    if not isinstance(small, CausalLM) or small.config.vocabulary != opened.model.config.vocabulary:
        raise ValueError(f"--draft must name a decoder-only model of one vocabulary, got {draft}")
    return DraftModel(small, sampling, seed)


def print_texts(
    opened: Opened, prompt: list[int], texts: Iterable[Iterable[int]], stop: list[str]
) -> None:
    """Print the prompt with each text, as its tokens come, and on a terminal the rate."""
    out, read = console(), () if isinstance(opened.model, EncoderDecoder) else prompt
    silent = stop_ids_of(opened.tokenizer)
    for tokens in texts:
        started, counted = time.perf_counter(), _Counted(tokens)
        spoken = (t for t in counted if t not in silent)
        pieces = stream_text(spoken, opened.tokenizer, stop, read)
        begun = False
        for piece in pieces:
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            out.file.write(shown)
            out.file.flush()
        out.print()
        if out.is_terminal:
            rate = counted.count / (time.perf_counter() - started)
            out.print(f"[dim]{counted.count} tokens, {rate:.1f} a second[/dim]")


class _Counted:
    """Iterates, and knows how many there were."""

    def __init__(self, tokens: Iterable[int]):
        self._tokens, self.count = tokens, 0

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            self.count += 1
            yield token
