"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, fields

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "step", "inverse_sqrt")
PRECISIONS = ("float32", "bfloat16")
_AT_LEAST_ONE = (
    "batch_size",
    "bptt",
    "epochs",
    "accumulation",
    "warmup_steps",
    "decay_every",
    "evaluation_batch_size",
)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the numbers of a run, apart from the model and the text.

    batch_size:    rows read side by side
    bptt:          tokens of each row in one step
    epochs:        passes over the text
    max_steps:     stop after this many steps; 0 means no limit
    optimizer:     "adamw", "adam" or "sgd"
    learning_rate: peak rate; with "inverse_sqrt" the factor before the formula
    weight_decay:  of AdamW (decoupled), or added to the gradient with Adam and SGD
    schedule:      "constant", "step" (times ``decay`` every ``decay_every`` steps) or
                   "inverse_sqrt" (warm-up over ``warmup_steps``)
    clip_norm:     largest norm of the gradient; 0 switches clipping off
    accumulation:  parts in which the rows of a step are computed, one after the other: the same
                   gradient in less memory
    precision:     "float32", or "bfloat16" for autocast
    seed:          of the initial weights and of dropout

    Raises ValueError that names the field, its rule and its value.
    """

    batch_size: int = 20
    bptt: int = 35
    epochs: int = 3
    max_steps: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup_steps: int = 4000
    decay: float = 0.95
    decay_every: int = 1000
    clip_norm: float = 0.5
    accumulation: int = 1
    precision: str = "float32"
    seed: int = 1
    evaluation_batch_size: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            # An int is welcome where a float is asked for, a bool is not a number here.
            value = getattr(self, field.name)
            accepted = {"int": (int,), "float": (int, float), "str": (str,)}[str(field.type)]
            if not isinstance(value, accepted) or isinstance(value, bool):
                raise ValueError(_message(field.name, f"be of type {field.type}", value))
        for name in _AT_LEAST_ONE:
            self._require(name, getattr(self, name) >= 1, "be at least 1")
        for name in ("max_steps", "weight_decay", "clip_norm", "seed"):
            self._require(name, getattr(self, name) >= 0, "be at least 0")
        self._require("learning_rate", self.learning_rate > 0, "be above 0")
        self._require("decay", 0 < self.decay <= 1, "be above 0 and at most 1")
        self._require("accumulation", self.accumulation <= self.batch_size, "be at most batch_size")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            self._require(name, getattr(self, name) in choices, f"be one of {', '.join(choices)}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(_message(name, rule, getattr(self, name)))


def _message(name: str, rule: str, value: object) -> str:
    return f"TrainingConfig: {name} must {rule}, got {value!r}"
