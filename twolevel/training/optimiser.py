"""SGD and its learning rate as a function of the step."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from twolevel.training.config import OptimiserConfig
from twolevel.training.rules import undecayed


def make_sgd(model: nn.Module, config: OptimiserConfig) -> torch.optim.SGD:
    """SGD over all parameters, with the weight decay that each is to have.

    Parameters that a convolution spares (gates) have none, and without `decay_norm` those of one dimension
    (norms, biases). DTensors have no fused form of it.
    """
    assert config.weight_decay is not None
    decay: dict[float, list[nn.Parameter]] = {}
    spared = undecayed(model)
    for parameter in model.parameters():
        spare = parameter in spared or (parameter.dim() <= 1 and not config.decay_norm)
        decay.setdefault(0.0 if spare else config.weight_decay, []).append(parameter)
    groups = [{"params": parameters, "weight_decay": value} for value, parameters in decay.items()]
    options = {"lr": config.learning_rate, "momentum": config.momentum, "nesterov": config.nesterov}
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return torch.optim.SGD(groups, **options, **({"foreach": True} if sharded else {"fused": True}))


def learning_rate(config: OptimiserConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, at most lr, then the schedule over the whole run.

    multistep: lr * gamma^(milestones passed); cosine: lr * (1 + cos(pi t)) / 2 for progress t after the warm-up.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        # The last step passes the end of a warm-up that is not a whole number of steps.
        return min(config.learning_rate, config.learning_rate * (step + 1) / warmup)
    if config.lr_schedule == "multistep":
        assert config.lr_milestones is not None
        passed = sum(step >= m * steps_per_epoch for m in config.lr_milestones)
        return config.learning_rate * config.lr_gamma**passed
    assert config.epochs is not None
    progress = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
