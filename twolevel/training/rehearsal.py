"""A run with --dry-run: what would be checked before its first step is, and what it would be is printed."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from twolevel import data, durable
from twolevel.analysis import count
from twolevel.analysis.count import countable
from twolevel.analysis.planner.plan import gigabytes, seconds
from twolevel.analysis.planner.single import Estimate
from twolevel.analysis.report import count_table
from twolevel.data.config import DataConfig
from twolevel.data.order import Order
from twolevel.distributed.agreement import together
from twolevel.distributed.strategies import Placed, Strategy
from twolevel.errors import UserError
from twolevel.terminal import Console
from twolevel.training import checkpoint
from twolevel.training.config import TrainConfig
from twolevel.training.context import Context, strategy_for
from twolevel.training.output import check_free
from twolevel.training.precise_batch_norm import check_number
from twolevel.training.preflight import apply_recompute, check_resumable, check_run
from twolevel.training.projection import project
from twolevel.training.weights import Weights


@dataclass(frozen=True)
class _Images:
    """What is known of a data set: nothing of it is decoded."""

    training: int
    num_classes: int
    missing: str = ""
    """why it would be downloaded first"""


def rehearse(config: TrainConfig, context: Context) -> None:
    """Print what the run would be; every rank calls this. Makes no file and takes no step.

    Raises UserError as the run would, but for what only a step, the room on a disk or another's lock can tell.
    """
    run = config.run
    with together(context.device):
        check_run(config, context.world, context.mesh)
        if context.first:
            _check_output(config.output, resume=run.resume)
    start = checkpoint.newest_good(config.output / "checkpoints") if run.resume else None
    images, steps = _read(config, context)
    if start is not None:
        with together(context.device):
            check_resumable(config, checkpoint.read_state(start), context.world.size)
    options = config.model.create_options(images.num_classes)
    # On the meta device a rank's part has shapes and no memory.
    strategy = strategy_for(config.mesh, context.mesh, "meta", run.precision)
    strategy.check_batch(config.data.batch, config.optimiser.accumulate)
    placed = context.build(
        strategy, options, run.seed, config.data.image_shape, sync_batch_norm=config.mesh.sync_batch_norm
    )
    apply_recompute(config, placed.model)
    with together(context.device):
        if context.first:
            _print(config, context, strategy, placed, images, steps, start)


def _check_output(output: Path, *, resume: bool) -> None:
    check_free(output, resume=resume)
    there = durable.existing(output)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output={output} cannot be written: {there} is not this user's to write in")


def _read(config: TrainConfig, context: Context) -> tuple[_Images, int]:
    """The data set, and the steps of an epoch; a data set in memory is verified and not loaded."""
    mesh, known = context.mesh, config.data.data_set.train_images
    if known is None:
        loaded = context.load_data(config.data, config.run.seed)
        images = _Images(len(loaded.train), loaded.num_classes)
    else:
        missing = ""
        with together(context.device):
            if context.world.local_rank == 0:
                missing = _why_missing(config.data)
        images = _Images(known, config.data.num_classes, missing)
    with together(context.device):
        place = mesh.get_local_rank("data"), mesh["data"].size()
        steps = Order(images.training, config.data.batch, config.run.seed, *place).steps_per_epoch
        check_number(config.optimiser.precise_batch_norm, steps)
    return images, steps


def _why_missing(config: DataConfig) -> str:
    """Empty where the data set is there. Raises UserError where it is not and would not be downloaded."""
    try:
        data.prepare(replace(config, download=False))
    except UserError as error:
        if not config.download:
            raise
        return str(error).partition(";")[0]
    return ""


def _print(
    config: TrainConfig,
    context: Context,
    strategy: Strategy,
    placed: Placed,
    images: _Images,
    steps: int,
    start: Path | None,
) -> None:
    run, optimiser, mesh = config.run, config.optimiser, context.mesh
    replicas, inner = mesh["data"].size(), mesh["group"].size()
    options = config.model.create_options(images.num_classes)
    console = Console()
    console.print("dry run: nothing is written and no step is taken")
    counted = count(
        countable(**options),
        config.data.image_shape,
        ranks=inner if config.mesh.parallel == "group" else 1,
        batch_size=config.data.batch // replicas,
        dtype=torch.bfloat16 if run.precision == "bf16" else strategy.dtype,
    )
    count_table(counted)
    console.print()
    found = project(config, strategy, mesh, options)
    rate = f"learning rate {optimiser.learning_rate:g}, {optimiser.lr_schedule}, {optimiser.update}"
    rows = {
        "mesh": f"{strategy} on {context.device.type} ({context.carriers(placed.model)})",
        "this rank": f"{placed.num_parameters():,} parameters",
        "memory a rank": _memory(found, config),
        "time of a step": _time(found, steps),
        "recipe": f"{optimiser.recipe}: {config.epochs} epochs of {steps:,} steps, batch {config.data.batch}, {rate}",
        "data": _data(config, images),
        "output": f"{config.output.absolute()}, {_beginning(config, start)}",
    }
    for name, text in rows.items():
        console.print(f"{name:16}{text}")


def _memory(found: Estimate, config: TrainConfig) -> str:
    cost, run = found.memory, config.run
    if cost is None:
        return f"not known: {found.why_no_memory}"
    factor = 2 if run.precision == "float64" else 1
    kept = cost.parameter_bytes + cost.gradient_bytes + cost.momentum_bytes
    return (
        f"{gigabytes(factor * cost.peak_bytes)} at the most by the cost model: {gigabytes(factor * kept)} of "
        f"parameters, gradients and momentum, {gigabytes(factor * cost.activation_bytes)} of activations"
    )


def _time(found: Estimate, steps: int) -> str:
    cost, machine = found.time, found.machine
    if cost is None or machine is None:
        return f"not known: {found.why_no_time}"
    epoch = seconds(steps * cost.step)
    return (
        f"{seconds(cost.step)}, {epoch} an epoch, by the cost model for {machine.name} ({machine.source}): "
        "a projection"
    )


def _data(config: TrainConfig, images: _Images) -> str:
    size = config.data.image_shape[-1]
    number, classes = f"{images.training:,} training images", f"{images.num_classes} classes"
    said = f"{config.data.data}: {number} of {size} x {size}, {classes}"
    return f"{said}; it would be downloaded first ({images.missing})" if images.missing else said


def _beginning(config: TrainConfig, start: Path | None) -> str:
    if start is not None:
        return f"going on from {start.name}"
    if config.run.start_from is not None:
        return f"a new run, from the weights of {Weights.find(config.run.start_from).path}"
    return "a new run; there is nothing to resume" if config.run.resume else "a new run"
