import pytest
import torch

from llmos_fast.data import build_vocab, encode_lines, windows
from llmos_fast.models import TransformerModel
from llmos_fast.training import Checkpoint, Trainer, TrainingConfig

WORDS = ["red", "green", "blue", "one", "two", "three"]


@pytest.fixture
def vocabulary():
    return build_vocab(WORDS)


@pytest.fixture
def text(vocabulary):
    """A stream of 8 windows for 4 rows of 5 tokens, the last window shorter."""
    lines = [" ".join(WORDS[(i * j) % 6] for j in range(1, 4)) for i in range(38)]
    return encode_lines(vocabulary, lines)


@pytest.fixture
def make_trainer(vocabulary, text):
    """Build a fresh small model and its trainer; keywords go to the configuration."""

    def make(dropout=0.2, **settings):
        config = TrainingConfig(**({"batch_size": 4, "bptt": 5, "epochs": 2} | settings))
        torch.manual_seed(config.seed)
        model = TransformerModel(len(vocabulary), 8, 2, 16, 2, dropout)
        return Trainer(model, windows(text, config.batch_size, config.bptt), config)

    return make


@pytest.fixture
def make_checkpoint(vocabulary):
    """Wrap a model as a checkpoint."""
    return lambda model: Checkpoint(model, vocabulary, "wikitext-2", 5)
