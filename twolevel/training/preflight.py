"""What is checked before a run's first step: kernels, what a resumed run changes, settings without effect."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.nn import recompute_blocks
from twolevel.ops.kernels import native
from twolevel.settings import MICROBATCHED, PIPELINES
from twolevel.training import trackers
from twolevel.training.config import TrainConfig
from twolevel.training.config.shape import largest_shape
from twolevel.training.graphed import check_capturable
from twolevel.training.trackers.base import Tracker


def check_run(config: TrainConfig, world: World, mesh: DeviceMesh) -> list[Tracker]:
    """Make sure that these ranks can do as asked; what shows the records, on rank 0.

    Raises UserError where they cannot, and warns of settings without effect. Holds no collective.
    """
    check_kernels(config, world.device)
    if config.run.cuda_graph:
        check_capturable(config, world)
    warn_of_ignored(config, mesh)
    return trackers.create(config.run.trackers) if world.rank == 0 else []


def apply_recompute(config: TrainConfig, model: nn.Module) -> None:
    """Have the blocks of this network computed again in backward, if that is asked for.

    Raises UserError where there are none.
    """
    if config.run.recompute == "blocks" and not recompute_blocks(model):
        raise UserError(
            f"recompute=blocks is invalid for {config.model.model}, which has no blocks; leave it out"
        )


def check_kernels(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError where the kernels that were asked for cannot compute on this device in this precision."""
    asked, precision = config.model.kernels, config.run.precision
    why = None
    if asked == "native":
        fits = device.type == "cpu" and precision == "float32"
        why = native.available() if fits else "it computes in float32 on CPUs"
    elif asked == "triton" and (device.type != "cuda" or precision == "float64"):
        why = "it computes in float32 or bf16 on GPUs"
    if why is not None:
        raise UserError(
            f"kernels={asked} is invalid for precision={precision} on {device.type}: {why}; use auto"
        )


def check_resumable(config: TrainConfig, state: dict[str, Any], ranks: int) -> None:
    """Raise UserError where a checkpoint's run differs in what cannot change; warn of what did change.

    `state` is the checkpoint's, `ranks` the number of those that go on.
    """
    before = {k: v for section in state["config"].values() for k, v in section.items()}
    known = config.flat()
    sections = {
        section: {k: v for k, v in values.items() if k in known}
        for section, values in state["config"].items()
    }
    TrainConfig.from_dict(sections, f"the checkpoint in {config.output}")
    changed = {k: v for k, v in config.flat().items() if k in before and before[k] != v}
    on_resume = config.on_resume()
    for name, value in changed.items():
        if on_resume[name] == "fixed":
            raise UserError(
                f"{name}={value!r} but the checkpoint in {config.output} is of a run with "
                f"{name}={before[name]!r}; go on with that, or name another --output"
            )
    for name, what in (("ema_decay", "moving average of the weights"), ("momentum", "momentum")):
        if config.flat()[name] and not before.get(name):
            raise UserError(
                f"{name}={changed[name]!r} but the checkpoint keeps no {what}; leave --{name.replace('_', '-')} out"
            )
    for name, value in changed.items():
        if on_resume[name] == "warned":
            warnings.warn(f"resumed with {name}={value!r}; it was {before[name]!r} before", stacklevel=2)
    now = _normalised_together(config.flat(), ranks)
    then = _normalised_together(config.flat() | {"mesh": "given"} | before, state["ranks"])
    if now != then:
        warnings.warn(
            f"resumed with batch norm over {now} images at a time; it was {then} before; to keep that, use as many "
            "replicas and parts of a batch as then (--sync-batch-norm counts all replicas as one)",
            stacklevel=2,
        )


def _normalised_together(settings: dict[str, Any], ranks: int) -> int:
    """The number of images over which batch norm takes its statistics in training."""
    parallel, parts = settings["parallel"], settings["accumulate"]
    if not settings["sync_batch_norm"]:
        automatic = settings["mesh"] == "auto"
        replicas = largest_shape(settings, ranks).data if automatic else settings["data_parallel"]
        parts *= ranks if parallel == "fsdp" else replicas
    if parallel in MICROBATCHED:
        parts *= settings["microbatches"] or ranks
    return settings["batch_size"] // parts


# Settings of the rule of one kind of convolution.
RULE_SETTINGS = {
    "dgc": ("lasso", "lasso_form", "threshold_steps"),
    "dgconv": ("complexity_divisor", "complexity_exponent"),
    "lgc": ("group_lasso",),
}


def warn_of_ignored(config: TrainConfig, mesh: DeviceMesh) -> None:
    """Warn of settings that differ from their default but have no effect on this run."""
    for section, name, why in _without_effect(config, mesh):
        value = getattr(section, name)
        if value != getattr(type(section), name):
            warnings.warn(f"{name}={value} is ignored: {why}", stacklevel=2)


def _without_effect(config: TrainConfig, mesh: DeviceMesh) -> Iterator[tuple[object, str, str]]:
    """(section, setting, why) of what this run does not ask for, at its default or not."""
    model, optimiser, rules = config.model, config.optimiser, config.rules
    for conv, names in RULE_SETTINGS.items():
        if conv != model.conv:
            yield from ((rules, name, f"conv={model.conv} has no such rule") for name in names)
    if model.conv == "dgc" and model.threshold == "head":
        yield rules, "threshold_steps", "threshold=head takes none over steps; use --threshold global"
    if model.conv == "dgconv" and rules.complexity_divisor is None:
        yield rules, "complexity_exponent", "there is no budget without --complexity-divisor"
    if model.conv == "lgc" and (model.condensation or model.groups) == 1:
        yield rules, "group_lasso", "condensation=1 drops no input"
    if model.conv != "gc2l" and not model.model.startswith("wrn-") and not config.mesh.sync_batch_norm:
        yield config.run, "remeasure", f"{model.model} with conv={model.conv} is computed in one way"
    if model.schedule == "dense":
        yield model, "kernels", "schedule=dense is one convolution of torch"
    if model.conv != "gc2l":
        yield from (
            (optimiser, f"{what}_{part}", f"conv={model.conv} has no such part")
            for what in ("lr", "momentum")
            for part in ("restriction", "coarse")
        )
    if not config.data.augment:
        yield config.data, "flip", "nothing is mirrored with --no-augment"
    if optimiser.lr_schedule != "multistep":
        yield optimiser, "lr_gamma", f"lr_schedule={optimiser.lr_schedule} has no milestones"
    elif all(milestone >= config.epochs for milestone in optimiser.lr_milestones or ()):
        yield optimiser, "lr_gamma", f"no milestone comes before epochs={config.epochs}"
    if not optimiser.weight_decay:
        yield optimiser, "decay_norm", "weight_decay=0 decays nothing"
    if mesh["data"].size() == 1:
        yield config.mesh, "sync_batch_norm", "there is one replica"
    if config.mesh.parallel in ("fsdp", *PIPELINES):
        yield config.mesh, "exchange", f"parallel={config.mesh.parallel} has no such exchange"
    elif mesh["group"].size() == 1:
        yield config.mesh, "exchange", "every rank holds all groups"
