"""Perplexity on held-out text."""

from __future__ import annotations

import math

import torch

from llmos_fast.data import Windows
from llmos_fast.models import LanguageModel


@torch.no_grad()
def perplexity(model: LanguageModel, text: Windows) -> float:
    """Perplexity of ``text``: exp of the mean cross-entropy, every token weighing the same.

    A token sees what precedes it in its own window. Dropout is off; the model's mode is restored.
    Infinite where the mean is too large for the exponential.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for data, targets in text:
            loss = model.loss(data.to(device), targets.to(device))
            total += loss.item() * targets.numel()
            count += targets.numel()
    finally:
        model.train(was_training)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf
