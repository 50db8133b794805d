"""Perplexity of torch.nn's stack and ours after the same training.

    python -m benchmarks.quality --layers torch --epochs 3 --seed 1 --out torch.json
    python -m benchmarks.quality --layers llmos_fast --epochs 3 --seed 1 --out llmos_fast.json

The setting is that of PyTorch's word language model on WikiText-2: all 33,278 words, width 200, 2
heads, 2 layers, dropout 0.2, 35 tokens by 20 rows, clipping at 0.5. AdamW at 1e-3 instead of the
example's SGD, which needs 40 epochs to get where this is after 3. Both runs start from the same
weights and read the same batches.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from llmos_fast.commands.torch_peer import TorchTransformerModel
from llmos_fast.data import build_vocab, encode_lines, open_corpus, windows
from llmos_fast.models import LanguageModel, TransformerModel
from llmos_fast.training import Trainer, TrainingConfig, perplexity

MODELS: dict[str, type[LanguageModel]] = {
    "torch": TorchTransformerModel,
    "llmos_fast": TransformerModel,
}
LOG_EVERY = 100


def build_model(layers: str, ntoken: int, seed: int, device: str) -> LanguageModel:
    """The tutorial's model with its usual start: the same weights for both kinds of layers."""
    torch.manual_seed(seed)
    start = TransformerModel(ntoken, 200, 2, 200, 2, dropout=0.2)
    model = MODELS[layers](ntoken, 200, 2, 200, 2, dropout=0.2)
    model.load_state_dict(start.state_dict())
    torch.manual_seed(seed)
    return model.to(device)


def main() -> None:
    """Train, and write the perplexities of each epoch to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", choices=MODELS, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=0, help="stop early; 0: never")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    corpus = open_corpus("wikitext-2")
    vocabulary = build_vocab(corpus.lines("train"), splitter="whitespace")
    config = TrainingConfig(
        epochs=arguments.epochs, seed=arguments.seed, max_steps=arguments.max_steps
    )
    streams = {name: encode_lines(vocabulary, corpus.lines(name)) for name in ("train", "valid")}
    held_out = windows(streams["valid"], config.evaluation_batch_size, config.bptt)
    model = build_model(arguments.layers, len(vocabulary), config.seed, arguments.device)
    trainer = Trainer(model, windows(streams["train"], config.batch_size, config.bptt), config)

    result = {
        "layers": arguments.layers,
        "vocabulary": len(vocabulary),
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": asdict(config),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "device": arguments.device,
        "machine": platform.machine(),
        "epochs": [],
    }
    start, losses = time.perf_counter(), []
    for step in trainer.steps():
        losses.append(step.loss.item())
        if step.number % LOG_EVERY == 0:
            mean = sum(losses[-LOG_EVERY:]) / LOG_EVERY
            speed = step.number * config.batch_size * config.bptt / (time.perf_counter() - start)
            print(f"step {step.number} loss {mean:.3f} {speed:.0f} tokens/s", file=sys.stderr)
        if step.ends_epoch or step.number == trainer.total_steps:
            result["epochs"].append(
                {
                    "epoch": step.epoch,
                    "steps": step.number,
                    "train_loss": sum(losses) / len(losses),
                    "valid_perplexity": perplexity(model, held_out),
                    "seconds": time.perf_counter() - start,
                }
            )
            losses.clear()
            print(json.dumps(result["epochs"][-1]))
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
