import pytest
import torch

from llmos_fast.training import learning_rate


def losses(trainer):
    return torch.stack([step.loss for step in trainer.steps()])


def test_steps_say_where_they_stand(make_trainer):
    trainer = make_trainer()
    steps = list(trainer.steps())
    per_epoch = len(trainer.text)
    assert per_epoch == 8
    assert [s.number for s in steps] == list(range(1, 17))
    assert [s.epoch for s in steps] == [1] * 8 + [2] * 8
    assert [s.number for s in steps if s.ends_epoch] == [8, 16]
    assert sum(s.tokens for s in steps[:8]) == 4 * (trainer.text.rows.shape[1] - 1)


@pytest.mark.parametrize(("max_steps", "expected"), [(0, 16), (3, 3), (99, 16)], ids=str)
def test_max_steps(make_trainer, max_steps, expected):
    trainer = make_trainer(max_steps=max_steps)
    assert trainer.total_steps == len(list(trainer.steps())) == expected


def test_the_same_seed_gives_the_same_losses(make_trainer):
    assert torch.equal(losses(make_trainer()), losses(make_trainer()))
    assert not torch.equal(losses(make_trainer()), losses(make_trainer(seed=2)))


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("adamw", 0.01), ("adam", 0.01), ("sgd", 0.5)], ids=str
)
def test_learns(make_trainer, optimizer, rate):
    seen = losses(make_trainer(optimizer=optimizer, learning_rate=rate, epochs=8))
    assert seen[-8:].mean() < 0.8 * seen[:8].mean()


@pytest.mark.parametrize("accumulation", [2, 3, 4], ids=str)
def test_accumulation_equals_the_big_batch(make_trainer, accumulation):
    """Also with 3 parts, which hold 2 and 2 of the 4 rows."""
    whole = make_trainer(dropout=0.0, optimizer="sgd", learning_rate=0.5)
    parts = make_trainer(dropout=0.0, optimizer="sgd", learning_rate=0.5, accumulation=accumulation)
    torch.testing.assert_close(losses(whole), losses(parts))
    for expected, got in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_uneven_parts_weigh_by_their_tokens(make_trainer):
    """5 rows in 2 parts: 3 and 2."""
    whole = make_trainer(dropout=0.0, batch_size=5)
    parts = make_trainer(dropout=0.0, batch_size=5, accumulation=2)
    torch.testing.assert_close(losses(whole), losses(parts))


def test_clipping(make_trainer):
    trainer = make_trainer(optimizer="sgd", learning_rate=1.0, weight_decay=0.0, clip_norm=0.01)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    step = next(trainer.steps())
    moved = [(b - p).flatten() for b, p in zip(before, trainer.model.parameters(), strict=True)]
    assert step.gradient_norm.item() > 0.01
    # SGD at rate 1 moves the weights by the clipped gradient.
    assert torch.cat(moved).norm().item() <= 0.01
    assert next(make_trainer(clip_norm=0).steps()).gradient_norm.item() == 0


def test_adamw_clips_as_torch_does(make_trainer):
    settings = {"clip_norm": 0.05, "learning_rate": 0.01, "dropout": 0.0}
    ours, theirs = make_trainer(**settings), make_trainer(**settings)
    assert ours.optimizer.refusal() is None
    theirs.optimizer = torch.optim.AdamW(theirs.model.parameters(), lr=0.01)
    ours, theirs = list(ours.steps()), list(theirs.steps())
    assert all(step.gradient_norm > 0.05 for step in ours)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.gradient_norm, other.gradient_norm)
        torch.testing.assert_close(mine.loss, other.loss)


def test_schedule_reaches_the_optimizer(make_trainer):
    trainer = make_trainer(schedule="inverse_sqrt", warmup_steps=4)
    for step in trainer.steps():
        expected = learning_rate(step.number, trainer.config, d_model=8)
        assert step.learning_rate == trainer.optimizer.param_groups[0]["lr"] == expected


def test_bfloat16(make_trainer):
    trainer = make_trainer(precision="bfloat16")
    assert all(torch.isfinite(step.loss) for step in trainer.steps())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert not torch.equal(losses(make_trainer(precision="bfloat16")), losses(make_trainer()))
