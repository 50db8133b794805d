"""The state of a training run on disk, so that it goes on exactly where it stood.

A training checkpoint is a checkpoint folder with two more files: training.json (settings, position,
optimizer settings) and training.safetensors (optimizer state, random generators).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmos_fast.checkpoints.storage import (
    current_folder,
    read_json,
    read_tensors,
    replace_folder,
    write_json,
    write_tensors,
)
from llmos_fast.training.checkpoint import Checkpoint
from llmos_fast.training.config import TrainingConfig
from llmos_fast.training.trainer import Trainer

_OPTIMIZER = "optimizer."
_CPU_GENERATOR = "generator.cpu"
_CUDA_GENERATOR = "generator.cuda"


def save_training(folder: Path | str, checkpoint: Checkpoint, trainer: Trainer) -> None:
    """Replace ``folder`` by a training checkpoint, all at once or not at all."""
    with replace_folder(Path(folder)) as partial:
        checkpoint.write(partial)
        state = trainer.optimizer.state_dict()
        tensors = {
            f"{_OPTIMIZER}{parameter}.{name}": value
            for parameter, values in state["state"].items()
            for name, value in values.items()
            if value is not None  # SGD without momentum
        }
        write_tensors(partial / "training.safetensors", tensors | _generator_states())
        content = {
            "config": asdict(trainer.config),
            "steps_done": trainer.steps_done,
            "parameter_groups": state["param_groups"],
        }
        write_json(partial / "training.json", content)


def load_training_config(folder: Path | str) -> TrainingConfig:
    """Settings of the run that wrote ``folder``. Raises ValueError where they are damaged."""
    path = current_folder(Path(folder)) / "training.json"
    try:
        return TrainingConfig(**read_json(path)["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"load_training_config: {path} is damaged: {error}") from error


def restore_training(folder: Path | str, trainer: Trainer) -> None:
    """Bring ``trainer``, whose model has its weights already, to where ``folder`` was written."""
    folder = current_folder(Path(folder))
    content = read_json(folder / "training.json")
    tensors = read_tensors(folder / "training.safetensors")
    try:
        trainer.optimizer.load_state_dict(
            {
                "state": _optimizer_state(tensors),
                "param_groups": content["parameter_groups"],
            }
        )
        trainer.steps_done = int(content["steps_done"])
        _restore_generators(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"restore_training: {folder} is damaged: {error}") from error


def _optimizer_state(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(_OPTIMIZER):
            parameter, name = key.removeprefix(_OPTIMIZER).split(".", 1)
            state.setdefault(int(parameter), {})[name] = value
    return state


def _generator_states() -> dict[str, Tensor]:
    states = {_CPU_GENERATOR: torch.get_rng_state()}
    if torch.cuda.is_available():
        states[_CUDA_GENERATOR] = torch.cuda.get_rng_state()
    return states


def _restore_generators(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors[_CPU_GENERATOR])
    if torch.cuda.is_available() and _CUDA_GENERATOR in tensors:
        torch.cuda.set_rng_state(tensors[_CUDA_GENERATOR])
