"""One step of a run: what its place in the run changes, and what follows the optimiser's."""

from collections.abc import Sequence

from torch import Tensor

from twolevel.training.graphed import GraphedStep
from twolevel.training.optimiser import learning_rate
from twolevel.training.rules import Rule, copy_choices
from twolevel.training.state import TrainState
from twolevel.training.step import TrainStep


def take_step(
    images: Tensor,
    labels: Tensor,
    state: TrainState,
    train_step: TrainStep | GraphedStep,
    rules: Sequence[Rule],
    all_steps: int,
) -> tuple[Tensor, float]:
    """One optimiser step of a run of `all_steps`, on this rank's share of a batch: its sums, and its learning rate.

    Moving average included; `state.step` stays. No host wait.
    """
    rate = learning_rate(state.config.optimiser, state.step, state.steps_per_epoch)
    train_step.set_rate(rate)
    for rule in rules:
        rule.begin_step(state.step / all_steps)
    sums = train_step(images, labels)
    if state.ema is not None:
        state.ema.update_parameters(state.model)
        copy_choices(state.model, state.ema.module)
    return sums, rate
