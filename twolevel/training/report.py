"""The pictures of a run: its curve, and what its learned or dynamic group convolutions chose."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from twolevel.analysis import pattern_figures as draw
from twolevel.analysis.figures import training_curve
from twolevel.analysis.patterns import (
    connections,
    group_numbers,
    group_sizes,
    kept_patterns,
    layers_of,
    spread,
)
from twolevel.data.augment import Normalise
from twolevel.data.config import DataConfig
from twolevel.distributed.strategies.base import EVAL_BATCH
from twolevel.errors import UserError
from twolevel.nn import DGConv2d, DynamicGroupConv2d, FLGConv2d, LearnedGroupConv2d
from twolevel.settings import Device
from twolevel.training import checkpoint, metrics
from twolevel.training.config import MeshConfig
from twolevel.training.context import Context, join
from twolevel.training.weights import Weights

Picture = tuple[str, Figure, str]
"""The name of a file, what is drawn in it, and what that shows."""

IMAGES, BATCHES = 6, 10
"""Of the test images, those that are shown; batches of EVAL_BATCH of them that are counted over."""

MOST_IMAGES = 50
"""Rows of a picture that is still of use; matplotlib draws no more than 65,536 pixels in one direction."""

# Convolutions that learn which channels they connect, and where records of epochs hold it.
LEARNED = {
    "dgconv": (DGConv2d, "dgconv_gates"),
    "flgc": (FLGConv2d, "flgc_groups"),
    "lgc": (LearnedGroupConv2d, None),
}


@dataclass
class Report:
    """`files`: what was written, and what it shows. `note`: why that is all, if so."""

    files: dict[Path, str] = field(default_factory=dict)
    note: str = ""


@dataclass
class Run:
    """The results of a run: its newest weights, the records of its epochs, and its name in titles."""

    path: Path
    weights: Weights
    epochs: list[dict[str, Any]]
    title: str

    @property
    def log(self) -> Path:
        return self.path / "metrics.jsonl"

    @classmethod
    def find(cls, path: Path) -> "Run":
        """Raises UserError where `path` is no run's folder or holds no checkpoint; warns of epochs not recorded."""
        if not (path / "checkpoints").is_dir():
            why = "it has no checkpoints/" if path.exists() else "it does not exist"
            raise UserError(f"{path} is not a run's folder: {why}; give the --output of a run")
        weights = Weights.find(path)
        state = checkpoint.read_state(weights.path)
        epochs = list(metrics.read(path, "epoch"))
        name, conv = weights.options["name"], weights.options["conv"]
        title = f"{path.resolve().name}: {name}, {conv}, after step {state['step']:,}"
        run = cls(path, weights, epochs, title)
        run._warn_of_gaps(state.get("epoch", 0))
        return run

    def _warn_of_gaps(self, num_epochs: int) -> None:
        recorded = {epoch["epoch"] for epoch in self.epochs}
        missing = [epoch for epoch in range(1, num_epochs + 1) if epoch not in recorded]
        if not self.log.exists():
            _warn(f"{self.log} is missing: what is drawn over epochs is left out")
        elif not self.epochs:
            _warn(f"{self.log} has no record of an epoch: what is drawn over epochs is left out")
        elif missing:
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            _warn(f"{self.log} lacks {len(missing)} of {num_epochs} epochs: {some}")

    def epochs_with(self, what: str) -> list[dict[str, Any]]:
        """The records of epochs that hold `what`; warns of others."""
        held = [epoch for epoch in self.epochs if what in epoch]
        if len(held) < len(self.epochs):
            consequence = "groups.png shows the others" if held else "groups.png is left out"
            missing = len(self.epochs) - len(held)
            _warn(f"{self.log} has no {what!r} in {missing} of {len(self.epochs)} epochs: {consequence}")
        return held


def write_report(
    path: Path,
    *,
    images: int | None = None,
    batches: int | None = None,
    data_root: Path | None = None,
    workers: int | None = None,
    device: Device = "auto",
) -> Report:
    """Draw the pictures of the run in the folder `path` into `path`/report, in place of earlier ones.

    Always `curve.png`. DGC: `kept_channels.png` of the first `images` test images of different classes, and
    `drop_frequency.png` over the first `batches` batches of test images. DGConv and FLGC: `groups.png` over
    epochs, and `connectivity.png`, which LGC has too. Warns of records that are missing and of options without effect.

    Raises UserError under more than one rank, for numbers out of range, where there is no run or its data
    set cannot be read, and where pictures cannot be written.
    """
    if images is not None and not 1 <= images <= MOST_IMAGES:
        raise UserError(f"images={images} is invalid; use 1 to {MOST_IMAGES}")
    if batches is not None and batches < 1:
        raise UserError(f"batches={batches} is invalid; use 1 or more")
    given = {"images": images, "batches": batches, "data_root": data_root, "workers": workers}
    given = {name: value for name, value in given.items() if value is not None}
    context = join(MeshConfig(device=device), {"path": str(path)})
    try:
        size = context.world.size
        if size > 1:
            raise UserError(f"report draws one set of pictures and takes one process, not {size} ranks")
        return _draw_all(Run.find(path), context, given)
    finally:
        context.close()


def _draw_all(run: Run, context: Context, given: dict[str, Any]) -> Report:
    report, folder = Report(), run.path / "report"
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        if run.epochs:
            steps = list(metrics.read(run.path, "step"))
            curve = training_curve(steps, run.epochs, run.title, folder / "curve.png")
            report.files[curve] = "loss and error over epochs"
    conv = run.weights.options["conv"]
    if conv == "dgc":
        pictures = _kept_pictures(run, context, given)
    else:
        for name, value in given.items():
            _warn(f"{name}={str(value)!r} is ignored: no picture of conv={conv} takes test images")
        if conv not in LEARNED:
            report.note = f"conv={conv} learns no groups and drops no channels: there is the curve alone"
            return report
        pictures = _group_pictures(run, context)
    for name, figure, what in pictures:
        with _writing(folder):
            figure.savefig(folder / name, dpi=120)
        report.files[folder / name] = what
    return report


def _kept_pictures(run: Run, context: Context, given: dict[str, Any]) -> Iterator[Picture]:
    """What the heads of a DGC network keep and drop of test images."""
    options = {name: value for name, value in given.items() if name in ("data_root", "workers")}
    # Training batches are not read.
    settings: dict[str, Any] = run.weights.data | options | {"batch_size": 1}
    config = DataConfig(**settings)
    data = context.load_data(config, 0, run.weights.dtype)
    if data.num_classes != run.weights.options["num_classes"]:
        raise UserError(
            f"{config.data} has {data.num_classes} classes, the network of {run.path} "
            f"{run.weights.options['num_classes']}"
        )
    network = _network(run, context)
    layers = spread(layers_of(network, DynamicGroupConv2d))
    batches = islice(data.test.eval_batches(EVAL_BATCH), given.get("batches", BATCHES))
    patterns = kept_patterns(network, layers, batches, given.get("images", IMAGES))
    shown = len(patterns.labels)
    if shown < given.get("images", 0):
        _warn(
            f"images={given['images']}: there are only {shown} classes in {patterns.num_images:,} test images, "
            "and one image of each is drawn"
        )

    pictures = thumbnails(patterns.images, data.normalise)
    names = [data.classes[label] for label in patterns.labels]
    citation = config.data_set.citation
    source = f"Images: {citation}" if citation else ""
    figure = draw.kept_channels(patterns, pictures, names, run.title, source)
    yield "kept_channels.png", figure, f"channels that each head keeps of {shown} test images"
    counted = f"{patterns.num_images:,} of {len(data.test):,} test images"
    figure = draw.drop_frequency(patterns, run.title)
    yield "drop_frequency.png", figure, f"how often each channel is dropped, over {counted}"


def _group_pictures(run: Run, context: Context) -> Iterator[Picture]:
    """The groups that the layers of a network have learned: of DGConv and FLGC over epochs, and of all now."""
    kind, recorded = LEARNED[run.weights.options["conv"]]
    epochs = run.epochs_with(recorded) if recorded else []
    when = [epoch["epoch"] for epoch in epochs]
    if epochs and kind is DGConv2d:
        figure = draw.groups_over_epochs(when, group_numbers(epochs), run.title)
        yield "groups.png", figure, "number of groups of each layer over epochs"
    elif epochs:
        figure = draw.group_sizes_over_epochs(when, spread(group_sizes(epochs)), run.title)
        yield "groups.png", figure, "channels of each group over epochs"
    layers = spread(layers_of(_network(run, context), kind))
    masks = {name: connections(layer) for name, layer in layers.items()}
    yield "connectivity.png", draw.connectivity(masks, run.title), "which channels are connected now"


def _network(run: Run, context: Context) -> nn.Module:
    """The network with the run's newest weights, in their type."""
    precision = "float64" if run.weights.dtype == torch.float64 else "float32"
    image_shape = DataConfig(**run.weights.data).image_shape
    network = context.build(context.strategy(precision), run.weights.options, 0, image_shape).model
    run.weights.load_into(network, context.mesh)
    return network


def thumbnails(images: Tensor, normalise: Normalise) -> np.ndarray:
    """Normalised images `[N, 3, H, W]` as pixels `[N, H, W, 3]`, uint8."""
    pixels = (images + normalise.shift.cpu()) / normalise.scale.cpu()
    return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from error


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
