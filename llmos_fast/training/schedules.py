"""Learning rates as pure functions of the step: nothing to save, nothing to restore.

Steps count from 1.
"""

from __future__ import annotations

from llmos_fast.training.config import TrainingConfig


def constant(step: int, *, rate: float) -> float:
    """The same rate at every step."""
    return rate


def step_decay(step: int, *, rate: float, decay: float, decay_every: int) -> float:
    """``rate`` times ``decay`` once for every ``decay_every`` whole steps, as torch's StepLR."""
    return float(rate * decay ** ((step - 1) // decay_every))


def inverse_sqrt(step: int, *, rate: float, d_model: int, warmup_steps: int) -> float:
    """``rate * d_model^-0.5 * min(step^-0.5, step * warmup^-1.5)``.

    Linear warm-up, then decay with the square root of the step: Vaswani et al. (2017), formula 3.
    """
    return float(rate * d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5))


def learning_rate(step: int, config: TrainingConfig, d_model: int) -> float:
    """Rate of ``step`` by the schedule of ``config`` for a model of width ``d_model``."""
    rate = config.learning_rate
    if config.schedule == "step":
        return step_decay(step, rate=rate, decay=config.decay, decay_every=config.decay_every)
    if config.schedule == "inverse_sqrt":
        return inverse_sqrt(step, rate=rate, d_model=d_model, warmup_steps=config.warmup_steps)
    return constant(step, rate=rate)
