"""Is the input pipeline ever waited for? Training steps that it feeds against steps on a batch that is there.

    python -m benchmarks input

    fed       each step on a new batch of the package's own loader: order, crop, flip, normalisation
    fixed     the same steps, on one of its batches, made beforehand
    loader    the batches alone, a whole epoch of them, its order included

The data set has CIFAR's size, 50,000 images of 32 x 32, of noise, and is on the device as bytes, as in `twolevel
train`. Fed and fixed steps take turns, in blocks of some steps. On a GPU a block's time is that between two events:
it has in it whatever the GPU waited for.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.step import Step
from twolevel import models
from twolevel.data.augment import Normalise
from twolevel.data.cifar import MEAN_STD
from twolevel.data.memory import LabelledImages, TrainInMemory
from twolevel.data.order import Order
from twolevel.errors import UserError
from twolevel.settings import Device

WARM_UP = 1  # blocks of either kind before the first timed one
IMAGES = 50_000
CLASSES = 10


@dataclass
class Settings:
    """Time training steps with and without the input pipeline."""

    device: Device = "auto"
    """where to run; auto takes the GPU where there is one"""

    model: str | None = None
    """network for images of 32 x 32, as for `twolevel train`; by default wrn-16-4 on the CPU, wrn-28-10 on a GPU"""

    conv: str = "gc2l"
    """its convolutions"""

    groups: int = 4
    """their channel groups"""

    batch: int | None = None
    """images in a step; by default 32 on the CPU, 128 on a GPU"""

    images: int = IMAGES
    """images in the data set"""

    steps: int = 5
    """steps in a block"""

    turns: int = 15
    """timed blocks of either kind"""

    threads: int = 1
    """threads of torch on the CPU; with 1, times are those that the thread had a core"""

    output: Path | None = None
    """file to write; by default results/input.json, on a GPU results/input-gpu.json"""

    def __post_init__(self) -> None:
        report.check_turns(self.turns)
        if self.steps < 1:
            raise UserError(f"--steps {self.steps} is not positive; use 1 or more")
        self.device = report.choose_device(self.device)
        on_gpu = self.device == "cuda"
        self.model = self.model or ("wrn-28-10" if on_gpu else "wrn-16-4")
        self.batch = self.batch or (128 if on_gpu else 32)
        self.output = self.output or report.RESULTS / ("input-gpu.json" if on_gpu else "input.json")
        if models.image_size(self.model) != 32:
            raise UserError(
                f"--model {self.model} takes larger images than CIFAR's; use one such as wrn-16-4"
            )


def loader(settings: Settings) -> TrainInMemory:
    """What `twolevel train --data cifar10` reads, with noise for images."""
    device = torch.device(settings.device)
    generator = torch.Generator().manual_seed(0)
    shape = (settings.images, 3, 32, 32)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (settings.images,), generator=generator)
    normalise = Normalise(*MEAN_STD["cifar10"], device, torch.float32)
    order = Order(settings.images, settings.batch, seed=0)
    return TrainInMemory(LabelledImages(pixels, labels).to(device), normalise, order, augment=True)


def endless(train: TrainInMemory) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        yield from train.batches(epoch)


def peers(settings: Settings) -> dict[str, Callable[[], None]]:
    """One step, by whether it is fed."""
    train = loader(settings)
    network = models.create(
        settings.model, conv=settings.conv, groups=settings.groups, num_classes=CLASSES
    ).train()
    batches = endless(train)
    batch = next(batches)
    step = Step(network, *batch)

    def fed() -> None:
        step.images, step.labels = next(batches)
        step()

    def fixed() -> None:
        step.images, step.labels = batch
        step()

    return {"fed": fed, "fixed": fixed}


def measure(settings: Settings) -> dict:
    """Milliseconds of a step by peer, of a batch of the loader alone, and their ratios."""
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    report.steady_memory()
    seconds = report.stopwatch(settings.device, settings.threads)
    of_block = partial(seconds, repeats=settings.steps)
    taken = report.take_turns(peers(settings), settings.turns, of_block, warm_up=WARM_UP)
    found = {name: report.summary(blocks) for name, blocks in taken.items()}
    alone = epoch_of_batches(settings, seconds)
    fed, fixed = (found[name]["median_ms"] for name in ("fed", "fixed"))
    return {
        "steps": found,
        "fed_to_fixed": fed / fixed,
        "added_ms": fed - fixed,
        "loader": alone,
        "loader_to_fixed": alone["batch_ms"] / fixed,
    }


def epoch_of_batches(settings: Settings, seconds: Callable[..., float]) -> dict:
    """Milliseconds of a batch, on average over an epoch that nothing else is done in; the first epoch warms up."""
    train = loader(settings)

    def epoch() -> None:
        for _ in train.batches(0):
            pass

    seconds(epoch)
    taken = seconds(epoch)
    return {
        "epoch_ms": 1e3 * taken,
        "batches": train.steps_per_epoch,
        "batch_ms": 1e3 * taken / train.steps_per_epoch,
    }


def table(found: dict) -> str:
    rows = [["", "ms", "quartiles", "/ fixed"]]
    for name, times in found["steps"].items():
        low, _, high = times["quartiles_ms"]
        ratio = times["median_ms"] / found["steps"]["fixed"]["median_ms"]
        rows.append(
            [f"step, {name}", f"{times['median_ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{ratio:.3f}"]
        )
    rows.append(
        ["batch of the loader", f"{found['loader']['batch_ms']:.2f}", "", f"{found['loader_to_fixed']:.3f}"]
    )
    return report.table(rows)


def main(argv: list[str]) -> None:
    settings = report.parse(Settings, "input", argv)
    facts = report.machine(settings.device)
    found = measure(settings)
    print(
        f"{settings.model} {settings.conv}, batch {settings.batch}, {settings.images} images, {settings.device}, "
        f"{settings.turns} turns of {settings.steps} steps"
    )
    print(table(found))
    report.write("input", argv, settings, facts, found)
