"""Settings of the optimiser and of what is done to loss and gradients."""

from dataclasses import dataclass

from twolevel.errors import UserError
from twolevel.settings import LRSchedule, RecipeName, Update
from twolevel.training.validation import check, check_finite, check_least


@dataclass
class OptimiserConfig:
    """The optimiser, its schedule, and what is done to loss and gradients; by the recipe what is not given."""

    recipe: RecipeName = "paper"
    """gives what is not given: paper, as published for data set and convolution; fast, few epochs of WRN on CIFAR"""

    epochs: int | None = None
    """passes over the training set; by the recipe unless given: on CIFAR 200 (paper), 12 (fast), on ImageNet 90"""

    update: Update | None = None
    """SGD with momentum, or Nesterov's; muon: likewise, but steps of kernels are orthogonalised, each group's alone"""

    learning_rate: float | None = None
    """learning rate after the warm-up; of muon that of SGD's part"""

    lr_matrices: float | None = None
    """muon: learning rate of the kernels after the warm-up"""

    lr_restriction: float = 1.0
    """gc2l: the restriction's learning rate as a multiple of that of its other kernels"""

    lr_coarse: float = 1.0
    """gc2l: the coarse term's, likewise"""

    lr_schedule: LRSchedule | None = None
    """multistep: times lr_gamma at each milestone, by epoch; cosine, linear: to 0 at the end, by step"""

    lr_milestones: tuple[int, ...] | None = None
    """epochs after which the rate drops; by the paper's recipe 60 120 160 on CIFAR, 30 60 on ImageNet"""

    lr_gamma: float = 0.1
    """factor of each drop"""

    warmup_epochs: float | None = None
    """epochs over which the rate rises linearly from 0"""

    momentum: float = 0.9
    """momentum of SGD and of muon"""

    momentum_restriction: float | None = None
    """gc2l: that of the restriction's kernels, unless it is that of all"""

    momentum_coarse: float | None = None
    """gc2l: that of the coarse term's, likewise"""

    weight_decay: float | None = None
    """L2 penalty; by the recipe unless given: 5e-4 on CIFAR, 1e-4 on ImageNet and of dgc"""

    decay_norm: bool = True
    """apply the weight decay to batch norm and biases too"""

    label_smoothing: float | None = None
    """share of the target that is spread over all classes"""

    accumulate: int = 1
    """parts in which a batch is computed, one after the other; batch norm sees one part"""

    clip_norm: float | None = None
    """scale gradients down to this norm, taken over all ranks"""

    ema_decay: float | None = None
    """also keep and test an exponential moving average of the weights, with this decay a step"""

    precise_batch_norm: int = 0
    """before each test recompute batch norm's statistics over this many training batches; 0 keeps running averages"""

    def __post_init__(self):
        check_finite(self)
        check_least(self, 1, "epochs", "accumulate")
        check_least(self, 0, "precise_batch_norm")
        for name in ("learning_rate", "lr_matrices", "lr_restriction", "lr_coarse", "lr_gamma"):
            value = getattr(self, name)
            check(self, name, value is None or value > 0, "a positive number")
        check_least(self, 0, "warmup_epochs")
        check(self, "momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        if self.update not in (None, "momentum") and not self.momentum > 0:
            raise UserError(f"update={self.update} needs momentum above 0, not momentum={self.momentum}")
        for name in ("momentum_restriction", "momentum_coarse"):
            value = getattr(self, name)
            check(self, name, value is None or 0 < value < 1, "a number between 0 and 1")
            if value is not None and not self.momentum:  # a checkpoint keeps that of all kernels, or of none
                raise UserError(f"{name}={value} needs momentum above 0, not momentum={self.momentum}")
        smoothing = self.label_smoothing
        check(self, "label_smoothing", smoothing is None or 0 <= smoothing < 1, "a number from 0 to below 1")
        check(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "a positive number")
        check(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")
        if self.update not in (None, "muon") and self.lr_matrices is not None:
            raise UserError(
                f"lr_matrices={self.lr_matrices} is of update=muon, not of {self.update}; leave it out"
            )
        if self.lr_milestones is not None:
            self.lr_milestones = tuple(self.lr_milestones)
            if self.lr_schedule in ("cosine", "linear"):
                raise UserError(
                    f"lr_milestones belong to lr_schedule=multistep; leave them out with {self.lr_schedule} "
                    "(--lr-milestones None)"
                )
            rising = [*self.lr_milestones] == sorted(self.lr_milestones)
            positive = all(milestone >= 1 for milestone in self.lr_milestones)
            check(self, "lr_milestones", rising and positive, "a rising list of epochs from 1 on")

    def check_together(self) -> None:
        """Raise UserError where settings that the recipe has completed do not fit each other."""
        assert self.epochs is not None and self.warmup_epochs is not None
        self.__post_init__()
        check_least(self, 0, "weight_decay")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"warmup_epochs={self.warmup_epochs} is more than epochs={self.epochs}")
        if self.lr_schedule == "multistep" and self.lr_milestones is None:
            raise UserError("lr_schedule=multistep needs --lr-milestones, which this recipe has not")
        if self.update == "muon" and self.lr_matrices is None:
            raise UserError("update=muon needs --lr-matrices, the learning rate of the kernels, such as 0.1")
