"""Training on real text: step by step the loss that torch.nn's layers have."""

from itertools import islice

import torch

from llmos_fast.commands.torch_peer import TorchTransformerModel
from llmos_fast.data import build_vocab, encode_lines, open_corpus, windows
from llmos_fast.models import TransformerModel
from llmos_fast.training import Trainer, TrainingConfig

STEPS = 200
RATE = 3e-4  # at higher ones a difference in rounding grows to 1e-2 within these steps


def test_the_loss_curve_is_that_of_torch():
    lines = list(islice(open_corpus("wikitext-2").lines("train"), 4000))
    vocabulary = build_vocab(lines, min_count=30, splitter="whitespace")
    config = TrainingConfig(batch_size=8, bptt=32, max_steps=STEPS, learning_rate=RATE)
    text = windows(encode_lines(vocabulary, lines), config.batch_size, config.bptt)
    ours = TransformerModel(len(vocabulary), 64, 4, 128, 2, dropout=0.0)
    theirs = TorchTransformerModel(len(vocabulary), 64, 4, 128, 2, dropout=0.0)
    theirs.load_state_dict(ours.state_dict())

    found, expected = (
        torch.stack([step.loss for step in Trainer(model, text, config).steps()])
        for model in (ours, theirs)
    )
    assert len(found) == STEPS
    assert expected[-20:].mean() < expected[:20].mean() - 1
    assert (found - expected).abs().max() < 1e-3
