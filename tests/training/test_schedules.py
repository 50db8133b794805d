import pytest
import torch

from llmos_fast.training import TrainingConfig, learning_rate


@pytest.mark.parametrize("step", [1, 2, 3999, 4000, 4001, 100000], ids=str)
def test_inverse_sqrt_is_the_formula(step):
    config = TrainingConfig(schedule="inverse_sqrt", learning_rate=1.0, warmup_steps=4000)
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert learning_rate(step, config, d_model=512) == expected


def test_inverse_sqrt_peaks_at_the_end_of_the_warm_up():
    config = TrainingConfig(schedule="inverse_sqrt", learning_rate=2.0, warmup_steps=10)
    rates = [learning_rate(step, config, d_model=64) for step in range(1, 50)]
    assert rates.index(max(rates)) + 1 == 10
    torch.testing.assert_close(max(rates), 2.0 / (64 * 10) ** 0.5)


def test_constant():
    config = TrainingConfig(learning_rate=0.25)
    assert {learning_rate(step, config, 8) for step in (1, 7, 10**6)} == {0.25}


def test_step_is_torch_step_lr():
    config = TrainingConfig(schedule="step", learning_rate=5.0, decay=0.5, decay_every=3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for step in range(1, 12):
        assert learning_rate(step, config, 8) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
