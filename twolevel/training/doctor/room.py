"""Room for what a run writes: its checkpoints, and what its data workers hand over."""

import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from twolevel import durable, models
from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.training import checkpoint
from twolevel.training.config import TrainConfig
from twolevel.training.doctor.cores import decoding
from twolevel.training.doctor.finding import Finding, ok, problem, size, warning

SHM = Path("/dev/shm")
SMALL_SHM = 2**26  # what docker gives unless asked
# Batches that each data worker has ready (torch's prefetch_factor), and the one that it makes.
AHEAD = 3
# Files of a run beside its checkpoints.
OTHER_FILES = 50


def checkpoint_bytes(config: TrainConfig) -> int:
    """Of one checkpoint: the network, its momentum and its moving average."""
    try:
        classes = config.data.num_classes
    except UserError:
        classes = 1000  # of ImageNet, whose folders are not there
    with torch.device("meta"):
        network = models.create(**config.model.create_options(classes))
    if config.run.precision == "float64":
        network = network.double()
    whole = sum(tensor.nbytes for tensor in network.state_dict().values())
    momentum = sum(p.nbytes for p in network.parameters()) if config.optimiser.momentum else 0
    return whole * (1 if config.optimiser.ema_decay is None else 2) + momentum


def kept(config: TrainConfig) -> int:
    """The most checkpoints that a run keeps."""
    run = config.run
    periodic = 0 if run.keep_epochs is None else config.epochs // run.keep_epochs
    return run.keep_checkpoints + run.keep_best + periodic


def check_room(config: TrainConfig, one: int, ranks: int, output: Path) -> Iterator[Finding]:
    """Of the file system of `output`, for checkpoints of `one` bytes each; what they take already is theirs."""
    number = kept(config) + 1  # one is written before another is removed
    there = _files_below(output / "checkpoints")
    free = shutil.disk_usage(durable.existing(output)).free
    needed = number * one - min(sum(there), kept(config) * one)
    found = f"{number} checkpoints of {size(one)} need {size(needed)} more in {output}, {size(free)} are free"
    if free >= needed:
        yield ok("room", found)
    else:
        advice = "free some, name an --output elsewhere, or keep fewer (--keep-checkpoints, --no-keep-best)"
        yield problem("room", found, advice)
    status = os.statvfs(durable.existing(output))
    files = number * (ranks + 3) + OTHER_FILES
    if not status.f_files:
        return  # the file system has no fixed number
    found = f"{status.f_favail:,} can be made in {output}, about {files:,} needed"
    if status.f_favail >= files:
        yield ok("files", found)
    else:
        yield problem("files", found, "remove some (df -i shows where), or name an --output elsewhere")


def _files_below(root: Path) -> list[int]:
    sizes = []
    for folder in checkpoint.complete(root).values():
        for file in folder.iterdir():
            sizes.append(file.stat().st_size)
    return sizes


def check_shm(config: TrainConfig, world: World) -> Iterator[Finding]:
    """Of one machine's shared memory, through which data workers hand over batches and NCCL talks."""
    if not SHM.exists():
        return
    usage = shutil.disk_usage(SHM)
    images = config.data.batch // config.mesh.data_parallel
    batch = images * prod(config.data.image_shape)  # a byte each
    needed = world.local_size * decoding(config) * AHEAD * batch
    found = f"{size(usage.total)}, of which {size(usage.free)} are free"
    raise_it = "docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm"
    if usage.free < needed:
        found = f"{found}; the data workers here need {size(needed)}"
        yield problem("/dev/shm", found, f"they die of a bus error: {raise_it}, or fewer --workers")
    elif usage.total <= SMALL_SHM and world.device.type == "cuda" and world.local_size > 1:
        yield warning("/dev/shm", found, f"NCCL between {world.local_size} ranks needs more: {raise_it}")
    else:
        yield ok("/dev/shm", found)
