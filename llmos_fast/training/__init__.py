"""Training: settings, loop, schedules, evaluation, logs, checkpoints."""

from llmos_fast.training.checkpoint import Checkpoint
from llmos_fast.training.config import TrainingConfig
from llmos_fast.training.evaluation import perplexity
from llmos_fast.training.logs import CsvLog, Log, Record, TensorBoardLog, read_log
from llmos_fast.training.plot import plot_loss, require_matplotlib
from llmos_fast.training.resume import load_training_config, restore_training, save_training
from llmos_fast.training.run import (
    ModelSettings,
    Run,
    TokenizerSettings,
    evaluation_windows,
    resume_run,
    start_run,
)
from llmos_fast.training.schedules import learning_rate
from llmos_fast.training.trainer import Step, Trainer

__all__ = [
    "Checkpoint",
    "CsvLog",
    "Log",
    "ModelSettings",
    "Record",
    "Run",
    "Step",
    "TensorBoardLog",
    "TokenizerSettings",
    "Trainer",
    "TrainingConfig",
    "evaluation_windows",
    "learning_rate",
    "load_training_config",
    "perplexity",
    "plot_loss",
    "read_log",
    "require_matplotlib",
    "restore_training",
    "resume_run",
    "save_training",
    "start_run",
]
