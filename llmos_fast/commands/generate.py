"""``llmos-fast generate``."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from llmos_fast.commands.options import (
    DEFAULT_DEVICE,
    CheckpointFolder,
    Device,
    Threads,
    find_checkpoint,
    use_machine,
)
from llmos_fast.commands.terminal import console
from llmos_fast.generation import Sampling, generate_text
from llmos_fast.training import Checkpoint


def generate(
    checkpoint: CheckpointFolder,
    prompt: Annotated[str, Option(help="Text to continue; empty: from the start of a line.")] = "",
    length: Annotated[int, Option(help="Tokens to add.")] = 50,
    temperature: Annotated[float, Option(help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, Option(help="Draw from this many tokens; 0: from all.")] = 0,
    top_p: Annotated[float, Option(help="Draw from the tokens that make up this share.")] = 1.0,
    seed: Annotated[int, Option(help="The same seed gives the same text.")] = 0,
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
    use_machine(device, threads)
    loaded = Checkpoint.load(find_checkpoint(checkpoint))
    text = generate_text(
        loaded.model.to(device),
        loaded.tokenizer,
        prompt,
        length,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        context=loaded.context,
        unknown=unknown,
        allow_unknown=allow_unknown,
    )
    console().print(text, markup=False)
