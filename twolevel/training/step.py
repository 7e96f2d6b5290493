"""One optimiser step, whatever the way in which ranks share the network."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from twolevel import models
from twolevel.data.config import DataConfig
from twolevel.distributed.agreement import together
from twolevel.distributed.strategies import Placed
from twolevel.distributed.strategies.base import autocast
from twolevel.errors import NotFinite
from twolevel.settings import Carrier, Parallel
from twolevel.training.config import MeshConfig, OptimiserConfig
from twolevel.training.config.recipes import fill_in, recipe_of
from twolevel.training.context import strategy_for
from twolevel.training.evaluate import batch_sums
from twolevel.training.optimiser import make_optimiser
from twolevel.training.rules import Rule


class TrainStep:
    """`step(images, labels)`: gradients of this rank's share of a batch, clipping, optimiser; no host wait.

    Returns [sum of losses, number right, number of images] of the logits that this rank has; `placed.total` sums
    them over the ranks. With `skip` a step whose loss or gradients are not finite, on any rank, changes nothing and
    returns zeros; it then waits for the device, and raises NotFinite where MOST_SKIPPED follow each other.
    """

    MOST_SKIPPED = 10

    def __init__(
        self,
        placed: Placed,
        optimiser: torch.optim.Optimizer,
        config: OptimiserConfig,
        rules: Sequence[Rule] = (),
        *,
        skip: bool = False,
    ):
        self.placed, self.optimiser = placed, optimiser
        self.config, self.rules = config, rules
        self.skip, self.skipped = skip, 0

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps to come."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimiser.zero_grad(set_to_none=True)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.placed.device)
        before = [buffer.clone() for buffer in self.placed.model.buffers()] if self.skip else []
        self.placed.forward_backward(images, labels, self._loss, self.config.accumulate)
        if self.skip and not self.placed.all_finite(self.sums):
            return self._skipped(before)
        self.skipped = 0
        if self.config.clip_norm is not None:
            self.placed.clip_(self.config.clip_norm)
        self.optimiser.step()
        return self.sums

    @torch.no_grad()
    def _skipped(self, before: list[Tensor]) -> Tensor:
        """Batch norm has taken its statistics of this step already: give it back those of before."""
        self.skipped += 1
        if self.skipped == self.MOST_SKIPPED:
            raise NotFinite(
                f"loss or gradients were not finite in {self.skipped} steps one after the other; "
                "try a lower --learning-rate, a --warmup-epochs, or a --clip-norm"
            )
        for buffer, value in zip(self.placed.model.buffers(), before, strict=True):
            buffer.copy_(value)
        return self.sums.zero_()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of one part of a batch, with what the training rules add to it."""
        with autocast(self.placed.device, self.placed.strategy.precision):
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing or 0.0)
            total = loss
            for rule in self.rules:
                total = rule.loss(total)
        self.sums += batch_sums(logits, labels, loss)
        return total


def make_step(
    model: str,
    mesh: DeviceMesh,
    device: torch.device | str,
    *,
    parallel: Parallel = "group",
    conv: str = "sc",
    groups: int = 1,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    num_classes: int = 10,
    microbatches: int | None = None,
    sync_batch_norm: bool = False,
    exchange: Carrier = "auto",
    precision: str = "float32",
    compile: bool = False,
    seed: int = 0,
    optimiser: OptimiserConfig | None = None,
) -> TrainStep:
    """The training step of a network by name, as `twolevel train` takes it, on the ranks of a mesh from `init_mesh`.

    `step(images, labels)` takes this rank's share of a batch: with b images and D ranks of the `data` axis b / D, the
    same on all ranks of the `group` axis. For fsdp all ranks are on the `data` axis, for the pipelines on `group`.
    `optimiser` is that of `twolevel train` on CIFAR unless given: SGD, learning rate 0.1, momentum 0.9, weight decay
    5e-4. Every rank must call this.

    Raises UserError, on every rank, for what cannot be combined.
    """
    config = MeshConfig(
        parallel=parallel,
        data_parallel=mesh["data"].size(),
        group_parallel=mesh["group"].size(),
        microbatches=microbatches,
        sync_batch_norm=sync_batch_norm,
        exchange=exchange,
    )
    config.check_conv(conv)
    strategy = strategy_for(config, mesh, device, precision)
    with together(device), torch.device("meta"):
        network = models.create(model, conv=conv, groups=groups, num_classes=num_classes)
    placed = strategy.place(network, seed, image_shape, sync_batch_norm=sync_batch_norm, compile=compile)
    placed.model.train()
    settings = replace(optimiser or OptimiserConfig())
    fill_in(settings, recipe_of(settings.recipe, DataConfig(data="cifar10"), model, conv))
    config.check_update(settings.update)
    return TrainStep(placed, make_optimiser(placed.model, settings), settings)
