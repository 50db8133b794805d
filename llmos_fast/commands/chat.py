"""``llmos-fast chat``."""

from __future__ import annotations

from typing import Annotated

import torch
from typer import Option

from llmos_fast.commands.opened import open_model
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
from llmos_fast.data import PretrainedTokenizer
from llmos_fast.generation import CachedDecoder, Conversation, Sampling
from llmos_fast.models import CausalLM


def chat(
    model: AnyModel,
    system: Annotated[str | None, Option(help="What the model is told first.")] = None,
    length: Annotated[int, Option(help="Most tokens of an answer.")] = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    scheme: Scheme = None,
    group_size: GroupSize = 32,
    int8_cache: Int8Cache = False,
    device: Device = DEFAULT_DEVICE,
    threads: Threads = 0,
) -> None:
    """Talk with a model that has a chat template; an empty line or Ctrl-D ends."""
    use_machine(device, threads)
    opened = open_model(model, scheme, group_size)
    tokenizer = opened.tokenizer
    if not isinstance(tokenizer, PretrainedTokenizer) or tokenizer.chat_template is None:
        raise ValueError(f"{model} has no chat template; use llmos-fast generate")
    if not isinstance(opened.model, CausalLM):
        raise ValueError(f"chat needs a decoder-only model, got a {type(opened.model).__name__}")
    opened.model.to(device)
    conversation = Conversation(
        CachedDecoder(opened.model, torch.int8 if int8_cache else None),
        tokenizer,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        stop=stop or (),
        system=system,
    )
    out = console()
    while True:
        try:
            said = out.input("> " if out.is_terminal else "")
        except EOFError:
            return
        if not said.strip():
            return
        for piece in conversation.ask(said, length):
            out.file.write(piece)
            out.file.flush()
        out.print()
