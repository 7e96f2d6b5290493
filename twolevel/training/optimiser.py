"""The optimiser and its learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from twolevel.nn import TwoLevelConv2d, layout_of
from twolevel.training.config import OptimiserConfig
from twolevel.training.muon import Muon
from twolevel.training.rules import undecayed


def make_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """SGD over all parameters, or Muon over the kernels and SGD over the rest.

    Each has the weight decay that it is to have: parameters that a convolution spares (gates) none, and without
    `decay_norm` those of one dimension (norms, biases). Of each parameter group `scale` is its learning rate as a
    multiple of that of the step. DTensors have no fused form of SGD.
    """
    assert config.weight_decay is not None and config.learning_rate is not None
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    kernels = _kernels(model) if config.update == "muon" else {}
    spared, parts = undecayed(model), _parts(model)
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        spare = parameter in spared or (parameter.dim() <= 1 and not config.decay_norm)
        decay = 0.0 if spare else config.weight_decay
        scale, momentum = _of_part(config, parts.get(parameter))
        groups.setdefault((decay, scale, momentum, kernels.get(parameter)), []).append(parameter)
    sgd, muon = [], []
    for (decay, scale, momentum, number), parameters in groups.items():
        group = {"params": parameters, "weight_decay": decay, "scale": scale, "momentum": momentum}
        if number is None:
            sgd.append(group)
        else:
            assert config.lr_matrices is not None
            ratio = config.lr_matrices / config.learning_rate
            muon.append(group | {"groups": number, "scale": scale * ratio})
    rest = torch.optim.SGD(
        sgd,
        config.learning_rate,
        config.momentum,
        nesterov=config.update != "momentum",
        foreach=sharded or None,
        fused=not sharded or None,
    )
    return Muon(muon, rest, lr=config.learning_rate, momentum=config.momentum) if muon else rest


def _of_part(config: OptimiserConfig, part: str | None) -> tuple[float, float]:
    """The learning rate, as a multiple, and the momentum of a part of `_parts`, or of what is in none."""
    if part is None:
        return 1.0, config.momentum
    own = getattr(config, f"momentum_{part}")
    return getattr(config, f"lr_{part}"), config.momentum if own is None else own


def _parts(model: nn.Module) -> dict[nn.Parameter, str]:
    """Restrictions and coarse terms, whose learning rate and momentum may differ from those of the local kernels."""
    layers = [module for module in model.modules() if isinstance(module, TwoLevelConv2d)]
    names = ("restriction", "coarse")
    return {getattr(layer, name).weight: name for layer in layers for name in names}


def _kernels(model: nn.Module) -> dict[nn.Parameter, int]:
    """The kernels of convolutions, and the number of channel groups in each: on every rank those that it holds."""
    layout = layout_of(model)
    found = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() != 4:
                continue
            split = layout.dims[f"{path}.{name}" if path else name] is not None
            # A replicated convolution of ours holds a kernel of as many input channels as a group has.
            conv = isinstance(module, nn.Conv2d)
            groups = module.groups if conv else getattr(module, "in_channels", 1) // parameter.shape[1] or 1
            found[parameter] = max(groups, len(layout.held_groups()) if split else 1)
    return found


def learning_rate(config: OptimiserConfig, step: int, steps_per_epoch: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, at most lr, then the schedule over the whole run.

    multistep: lr * gamma^(milestones passed); for progress t after the warm-up cosine: lr * (1 + cos(pi t)) / 2;
    linear: lr * (1 - t).
    """
    assert config.learning_rate is not None and config.warmup_epochs is not None
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
    share = 1 - progress if config.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share
