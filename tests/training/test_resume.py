import errno
import json

import pytest
import torch

from llmos_fast.training import (
    Checkpoint,
    load_training_config,
    restore_training,
    resume,
    save_training,
)

CONFIGS = {
    "adamw": {},
    "adam": {"optimizer": "adam", "schedule": "inverse_sqrt", "warmup_steps": 5},
    "sgd": {"optimizer": "sgd", "schedule": "step", "decay_every": 3, "learning_rate": 0.5},
    "accumulation": {"accumulation": 2},
    "bfloat16": {"precision": "bfloat16"},
}


def train(trainer, stop=None):
    """Losses of the run, up to step ``stop``."""
    losses = []
    for step in trainer.steps():
        losses.append(step.loss.item())
        if step.number == stop:
            break
    return losses


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("stop", [3, 8, 11], ids=["mid epoch", "end of epoch", "second epoch"])
def test_goes_on_exactly(make_trainer, make_checkpoint, tmp_path, settings, stop):
    unbroken = make_trainer(**settings)
    expected = train(unbroken)

    stopped = make_trainer(**settings)
    first = train(stopped, stop)
    save_training(tmp_path / "c", make_checkpoint(stopped.model), stopped)

    torch.manual_seed(999)  # as in another process
    resumed = make_trainer(**settings, seed=7)
    resumed.model.load_state_dict(Checkpoint.load(tmp_path / "c").model.state_dict())
    restore_training(tmp_path / "c", resumed)
    assert resumed.steps_done == stop
    assert first + train(resumed) == expected
    for theirs, ours in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_config_round_trip(make_trainer, make_checkpoint, tmp_path):
    trainer = make_trainer(learning_rate=0.1 + 0.2, seed=3)
    save_training(tmp_path / "c", make_checkpoint(trainer.model), trainer)
    assert load_training_config(tmp_path / "c") == trainer.config


def test_disk_full_keeps_the_last_checkpoint(make_trainer, make_checkpoint, tmp_path, monkeypatch):
    trainer = make_trainer()
    train(trainer, 2)
    save_training(tmp_path / "c", make_checkpoint(trainer.model), trainer)
    train(trainer, 5)

    def full(path, content):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(resume, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_training(tmp_path / "c", make_checkpoint(trainer.model), trainer)
    fresh = make_trainer()
    restore_training(tmp_path / "c", fresh)
    assert fresh.steps_done == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", ["training.json", "training.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_files(make_trainer, make_checkpoint, tmp_path, name, damage):
    trainer = make_trainer()
    save_training(tmp_path / "c", make_checkpoint(trainer.model), trainer)
    path = tmp_path / "c" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=name):
        restore_training(tmp_path / "c", trainer)


def test_wrong_content(make_trainer, make_checkpoint, tmp_path):
    trainer = make_trainer()
    save_training(tmp_path / "c", make_checkpoint(trainer.model), trainer)
    path = tmp_path / "c" / "training.json"
    path.write_text(json.dumps({"config": {"colour": 1}}))
    with pytest.raises(ValueError, match="is damaged"):
        restore_training(tmp_path / "c", trainer)
    with pytest.raises(ValueError, match="is damaged"):
        load_training_config(tmp_path / "c")
