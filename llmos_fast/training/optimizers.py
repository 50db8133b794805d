"""Optimizers by name."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from llmos_fast.training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """The optimizer ``config`` names, over all parameters of ``model`` that want a gradient."""
    kinds: dict[str, type[AdamW] | type[Adam] | type[SGD]] = {
        "adamw": AdamW,
        "adam": Adam,
        "sgd": SGD,
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = kinds[config.optimizer]
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
