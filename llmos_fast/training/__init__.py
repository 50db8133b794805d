"""Training: settings, loop, schedules, evaluation, checkpoints."""

from llmos_fast.training.config import TrainingConfig
from llmos_fast.training.evaluation import perplexity
from llmos_fast.training.schedules import learning_rate
from llmos_fast.training.trainer import Step, Trainer

__all__ = [
    "Step",
    "Trainer",
    "TrainingConfig",
    "learning_rate",
    "perplexity",
]
