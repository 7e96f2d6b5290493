"""The learning rate as a function of the step."""

import pytest

from twolevel.training.config import OptimiserConfig, TrainConfig
from twolevel.training.optimiser import learning_rate


def rates(epochs=4, steps=10, **options) -> list[float]:
    config = TrainConfig(optimiser=OptimiserConfig(epochs=epochs, **options)).optimiser
    return [learning_rate(config, step, steps) for step in range(epochs * steps)]


def test_multistep_drops_at_its_milestones():
    got = rates(learning_rate=1.0, lr_milestones=(1, 3), lr_gamma=0.5)
    assert got == [1.0] * 10 + [0.5] * 20 + [0.25] * 10


def test_cosine_falls_from_the_full_rate_to_nearly_nothing():
    got = rates(learning_rate=0.2, lr_schedule="cosine")
    assert got[0] == 0.2
    assert got[20] == pytest.approx(0.1)
    assert got == sorted(got, reverse=True)
    assert 0 < got[-1] < 0.001


@pytest.mark.parametrize("schedule", [{"lr_milestones": (3,)}, {"lr_schedule": "cosine"}])
def test_warm_up_rises_linearly_and_meets_the_schedule(schedule):
    got = rates(learning_rate=1.0, warmup_epochs=0.5, **schedule)
    assert got[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


@pytest.mark.parametrize("steps", [1, 3, 10, 16])
@pytest.mark.parametrize("warmup", [0.01, 0.15, 0.3, 0.5, 1.0, 1.25, 2.0])
@pytest.mark.parametrize("schedule", [{"lr_milestones": (3,)}, {"lr_schedule": "cosine"}])
def test_no_step_exceeds_the_learning_rate(schedule, warmup, steps):
    got = rates(steps=steps, learning_rate=0.1, warmup_epochs=warmup, **schedule)
    assert max(got) <= 0.1


def test_a_warm_up_of_whole_steps_is_the_same_to_the_last_bit():
    got = rates(learning_rate=0.4, warmup_epochs=0.7, lr_milestones=(3,))
    assert got[:7] == [0.4 * (step + 1) / 7 for step in range(7)]
