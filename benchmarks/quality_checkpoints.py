"""Perplexity of small published checkpoints in every precision and scheme, as ``load`` makes them.

    python -m benchmarks.quality_checkpoints --data ../shared/data --out FILE

``--data`` is a folder with models/stories260k, models/babyllama_tok105, tinystories and wikitext2,
as in this project's shared data, which is not part of the package. Perplexities are per token, of
tokenizers that differ: compare them within a column.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import llmos_fast
from benchmarks.stories260k import validation_stories
from llmos_fast.data import PretrainedTokenizer
from llmos_fast.models import CausalLM

CHECKPOINTS = {
    "stories260K": "models/stories260k/stories260K.bin",
    "babyllama": "models/babyllama_tok105/model5000.bin",
}
WINDOWS = 128
SCHEMES: list[dict[str, object]] = [
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16},
    *({"scheme": scheme} for scheme in ("int8", "fp8", "fp8_block")),
    *(
        {"scheme": scheme, "group_size": group_size}
        for scheme in ("int4", "int4_asym", "nf4")
        for group_size in (32, 64, 128)
    ),
]


def texts(data: Path) -> dict[str, list[str]]:
    """Documents of each text."""
    raw = (data / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8")
    return {"TinyStories": validation_stories(data / "tinystories"), "WikiText-2": [raw]}


def windows(tokenizer: PretrainedTokenizer, documents: list[str], length: int) -> Tensor:
    """Int[windows length]: documents, each after a begin token, one after another."""
    tokens: list[int] = []
    for document in documents:
        if len(tokens) >= WINDOWS * length:
            break
        # more characters than the windows hold need not be encoded
        tokens += tokenizer.encode(document[: 8 * WINDOWS * length].strip())
    return torch.tensor(tokens[: min(WINDOWS, len(tokens) // length) * length]).view(-1, length)


@torch.no_grad()
def perplexity(model: CausalLM, rows: Tensor) -> float:
    losses = [model.loss(part[:, :-1], part[:, 1:]).item() * len(part) for part in rows.split(8)]
    return math.exp(sum(losses) / len(rows))


def name_of(arguments: dict[str, object]) -> str:
    if "scheme" not in arguments:
        return str(arguments["dtype"])[6:]
    group = f", groups of {arguments['group_size']}" if "group_size" in arguments else ""
    return f"{arguments['scheme']}{group}"


def main() -> None:
    """Measure, and write a JSON file after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with models and texts")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, object] = {"torch": torch.__version__, "windows": WINDOWS, "rows": []}
    rows: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    documents = texts(arguments.data)
    for checkpoint, file in CHECKPOINTS.items():
        path = arguments.data / file
        if not path.exists():
            print(f"SKIPPED: {checkpoint}, no {path}", file=sys.stderr)
            continue
        tokenizer = llmos_fast.load_tokenizer(path)
        length = llmos_fast.load(path).config.max_length
        held_out = {name: windows(tokenizer, text, length) for name, text in documents.items()}
        for scheme in SCHEMES:
            model = llmos_fast.load(path, **scheme)
            start = time.perf_counter()
            found = {name: perplexity(model, text) for name, text in held_out.items()}
            seconds = time.perf_counter() - start
            rows.append(
                {"checkpoint": checkpoint, "weights": name_of(scheme), **found, "seconds": seconds}
            )
            values = ", ".join(f"{text} {value:.3f}" for text, value in found.items())
            print(f"{checkpoint:12} {name_of(scheme):24} {values}  {seconds:.1f} s", flush=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
