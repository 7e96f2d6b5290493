"""Batch norm's statistics for a test, recomputed from training batches with the present weights."""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn

from twolevel.data.split import TrainSplit
from twolevel.distributed.batch_norm import batch_statistics
from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.strategies import Placed
from twolevel.errors import UserError


def check_number(number: int, steps: int) -> None:
    """Raise UserError where an epoch of `steps` does not have `number` batches."""
    if number > steps:
        raise UserError(
            f"precise_batch_norm={number} is more than the {steps} batches of an epoch; use at most {steps}"
        )


@torch.no_grad()
def recompute_statistics(
    placed: Placed,
    model: nn.Module,
    train: TrainSplit,
    *,
    epoch: int,
    number: int,
    pause: Callable[[int], None] | None = None,
) -> None:
    """Set running mean and variance of every batch norm to those of the first `number` batches of `epoch`.

        mean = E[mean_b]        var = E[var_b + mean_b²] - E[mean_b]²        over the batches b

    Precise batch norm, Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3.1. A running
    average lags behind: most of it comes from weights of earlier steps.

    While a batch passes through, each batch norm normalises by it, as in training; all else is as in evaluation,
    which is what the statistics are for: nothing is dropped out, and no training rule sees these batches. A batch is
    that of all replicas, whole, whatever sync_batch_norm and accumulate make of it in training, so that the
    statistics do not depend on the ranks, and all replicas get the same. No random stream moves, and nothing else
    of the network changes.

    `model` is this rank's part of the network, or a copy of it such as its moving average. `pause` is called before
    each batch with its number; where it raises, the statistics are what they were. Every rank must call this.
    """
    training = model.training
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    axis = MeshAxis(placed.mesh.get_group("data"))
    populations = [_Population(norm, axis) for norm in norms]
    try:
        # A graph that is compiled already would not call their hooks.
        with torch.compiler.set_stance("force_eager"):
            for batch, (images, _) in enumerate(islice(train.batches(epoch), number)):
                if pause is not None:
                    pause(batch)
                placed.logits(model, images)
        for population in populations:
            population.finish()
    except BaseException:
        for population in populations:
            population.undo()
        raise
    finally:
        for population in populations:
            population.hook.remove()
        placed.end_forwards(model)
        model.train(training)


class _Population:
    """Has a batch norm in evaluation normalise by the batch that it is given, and sums up over batches."""

    def __init__(self, norm: nn.BatchNorm2d, axis: MeshAxis):
        self.axis = axis
        self.number = 0
        assert norm.running_mean is not None and norm.running_var is not None
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.mean, self.spread = (torch.zeros_like(self.running_mean, dtype=torch.float64) for _ in range(2))
        self.before = (self.running_mean.clone(), self.running_var.clone())
        self.hook = norm.register_forward_pre_hook(self._see)

    def _see(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        mean, var, _ = batch_statistics(inputs[0], self.axis)
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        # Squares of differences instead of differences of squares, which lose digits (Welford, 1962).
        self.number += 1
        off = mean.double() - self.mean
        self.mean += off / self.number
        self.spread += var.double() + off * (mean.double() - self.mean)

    def undo(self) -> None:
        for running, before in zip((self.running_mean, self.running_var), self.before, strict=True):
            running.copy_(before)

    def finish(self) -> None:
        if self.number:
            self.running_mean.copy_(self.mean)
            self.running_var.copy_(self.spread / self.number)
