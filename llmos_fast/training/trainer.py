"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmos_fast.data import Windows
from llmos_fast.models import LanguageModel
from llmos_fast.training.config import TrainingConfig
from llmos_fast.training.optimizers import build_optimizer, clipped_step
from llmos_fast.training.schedules import learning_rate


class Step(NamedTuple):
    """What one step did.

    number:        counts from 1
    epoch:         counts from 1
    ends_epoch:    whether this step read the last window of its epoch
    loss:          mean cross-entropy before the update, Float[]
    gradient_norm: before clipping, Float[]; 0 where clipping is off
    tokens:        targets read
    """

    number: int
    epoch: int
    ends_epoch: bool
    loss: Tensor
    gradient_norm: Tensor
    learning_rate: float
    tokens: int


class Trainer:
    """Trains ``model`` on ``text``, one window per step.

    ``steps_done`` says where the run stands: with it, the model, the optimizer and the random
    generators a run is restored exactly.
    """

    def __init__(self, model: LanguageModel, text: Windows, config: TrainingConfig):
        self.model = model
        self.text = text
        self.config = config
        self.optimizer = build_optimizer(model, config)
        self.steps_done = 0
        self._device = next(model.parameters()).device

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        steps = self.config.epochs * len(self.text)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def steps(self) -> Iterator[Step]:
        """Train, from where the run stands to its end, one step at a time.

        Whoever iterates decides what happens between steps: logging, evaluation, checkpoints.
        """
        while self.steps_done < self.total_steps:
            epoch, window = divmod(self.steps_done, len(self.text))
            self.model.train()
            loss, norm, rate, tokens = self._step(*self.text.window(window))
            self.steps_done += 1
            ends_epoch = window + 1 == len(self.text)
            yield Step(self.steps_done, epoch + 1, ends_epoch, loss, norm, rate, tokens)

    def _step(self, data: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float, int]:
        rate = learning_rate(self.steps_done + 1, self.config, self.model.ninp)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self._accumulate_gradients(data.to(self._device), targets.to(self._device))
        norm = clipped_step(self.optimizer, self.config.clip_norm)
        return loss, norm, rate, targets.numel()

    def _accumulate_gradients(self, data: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=self._device)
        parts = self.config.accumulation
        for part, part_targets in zip(data.chunk(parts), targets.chunk(parts), strict=True):
            with torch.autocast(
                self._device.type,
                dtype=torch.bfloat16,
                enabled=self.config.precision == "bfloat16",
            ):
                loss = self.model.loss(part, part_targets)
            share = part_targets.numel() / targets.numel()
            (loss * share).backward()
            total += loss.detach().float() * share
        return total
