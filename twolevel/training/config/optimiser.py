"""Settings of SGD and of what is done to loss and gradients."""

from dataclasses import dataclass

from twolevel.errors import UserError
from twolevel.settings import LRSchedule
from twolevel.training.validation import check, check_finite, check_least


@dataclass
class OptimiserConfig:
    """SGD, its schedule, and what is done to loss and gradients."""

    epochs: int | None = None
    """passes over the training set; 200 on CIFAR, 90 on ImageNet"""

    learning_rate: float = 0.1
    """learning rate after the warm-up"""

    lr_schedule: LRSchedule = "multistep"
    """multistep: times lr_gamma at each milestone, by epoch; cosine: to 0 at the end, by step"""

    lr_milestones: tuple[int, ...] | None = None
    """epochs after which the rate drops; 60 120 160 on CIFAR, 30 60 on ImageNet"""

    lr_gamma: float = 0.1
    """factor of each drop"""

    warmup_epochs: float = 0.0
    """epochs over which the rate rises linearly from 0"""

    momentum: float = 0.9
    """momentum of SGD"""

    nesterov: bool = False
    """Nesterov's form of the momentum"""

    weight_decay: float | None = None
    """L2 penalty; 5e-4 on CIFAR, 1e-4 on ImageNet"""

    decay_norm: bool = True
    """apply the weight decay to batch norm and biases too"""

    label_smoothing: float = 0.0
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
        check(self, "learning_rate", self.learning_rate > 0, "a positive number")
        check(self, "lr_gamma", self.lr_gamma > 0, "a positive number")
        check(self, "warmup_epochs", self.warmup_epochs >= 0, "0 or more")
        check(self, "momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        check(self, "nesterov", not self.nesterov or self.momentum > 0, "momentum above 0")
        check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "a number from 0 to below 1")
        check(self, "clip_norm", self.clip_norm is None or self.clip_norm > 0, "a positive number")
        check(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "a number between 0 and 1")
        if self.lr_milestones is not None:
            self.lr_milestones = tuple(self.lr_milestones)
            if self.lr_schedule == "cosine":
                raise UserError(
                    "lr_milestones belong to lr_schedule=multistep; leave them out with cosine (--lr-milestones None)"
                )
            rising = [*self.lr_milestones] == sorted(self.lr_milestones)
            positive = all(milestone >= 1 for milestone in self.lr_milestones)
            check(self, "lr_milestones", rising and positive, "a rising list of epochs from 1 on")
