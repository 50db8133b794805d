"""Optimizers by name, and a step that clips."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from llmos_fast.optim import AdamW
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
    # torch's own default makes several passes over memory
    fused = None if kind is AdamW and all(p.is_cpu for p in parameters) else True
    rate, decay = config.learning_rate, config.weight_decay
    return kind(parameters, lr=rate, weight_decay=decay, fused=fused)


def clipped_step(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Step with a gradient of at most this norm; return the norm before, Float[].

    With ``max_norm`` 0 the gradient is what it is, and 0 is returned.
    """
    if not max_norm:
        optimizer.step()
        return torch.zeros(())
    if isinstance(optimizer, AdamW):
        optimizer.step(max_norm=max_norm)
        assert optimizer.grad_norm is not None
        return optimizer.grad_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return norm
