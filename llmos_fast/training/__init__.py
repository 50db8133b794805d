"""Training: settings, loop, schedules, evaluation, logs, checkpoints."""

from llmos_fast.training.checkpoint import Checkpoint, Quantization, quantize_linears
from llmos_fast.training.config import TrainingConfig
from llmos_fast.training.evaluation import perplexity
from llmos_fast.training.logs import CsvLog, Log, Record, TensorBoardLog, read_log
from llmos_fast.training.plot import plot_loss
from llmos_fast.training.resume import load_training_config, restore_training, save_training
from llmos_fast.training.schedules import learning_rate
from llmos_fast.training.trainer import Step, Trainer

__all__ = [
    "Checkpoint",
    "CsvLog",
    "Log",
    "Quantization",
    "Record",
    "Step",
    "TensorBoardLog",
    "Trainer",
    "TrainingConfig",
    "learning_rate",
    "load_training_config",
    "perplexity",
    "plot_loss",
    "quantize_linears",
    "read_log",
    "restore_training",
    "save_training",
]
