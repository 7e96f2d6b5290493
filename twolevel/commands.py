"""What each command of the command line does with its options."""

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import count as count_from
from pathlib import Path
from typing import Annotated, Literal

import tyro

from twolevel.errors import UserError
from twolevel.options import parse
from twolevel.training.config import MeshConfig, ModelConfig, TrainConfig
from twolevel.training.validation import check_least


def train(argv: list[str]) -> None:
    argv, default = _take_config(argv)
    config = parse(TrainConfig, "train", argv, default)
    from twolevel.training.loop import train as run

    run(config)


def _take_config(argv: list[str]) -> tuple[list[str], TrainConfig | None]:
    """`--config FILE` gives other defaults: those of an earlier run's config.json."""
    if "--help" in argv or "-h" in argv:
        print("--config FILE   start from the settings in this config.json; further options change them\n")
    for index, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            inline = word.partition("=")[2]
            rest = argv[index + (1 if inline else 2) :]
            path = inline or (argv[index + 1] if index + 1 < len(argv) else "")
            try:
                settings = json.loads(Path(path).read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"--config {path!r} cannot be read: {error}") from error
            if isinstance(settings, dict) and isinstance(settings.get("run"), dict):
                settings["run"].pop("resume", None)  # how a run was started, not what it was
            config = TrainConfig.from_dict(settings, path)
            rest = argv[:index] + rest
            if Path(path).resolve().parent == config.run.output.resolve() and "--resume" not in rest:
                config.run.output = _new_beside(config.run.output)  # the file is a run's own record
            return rest, config
    return argv, None


def _new_beside(folder: Path) -> Path:
    """NAME-2 of a folder NAME, or the next number that is free."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count_from(2))
    return next(path for path in numbered if not path.exists())


@dataclass
class EvaluateConfig:
    """Test a run (its newest checkpoint), one checkpoint, or an exported file, on any number of ranks."""

    path: tyro.conf.Positional[Path]
    """folder of a run or a checkpoint, or a .safetensors file"""

    weights: Literal["model", "ema"] = "model"
    """the weights themselves, or their exponential moving average"""

    data: str | None = None
    """data set: sample, cifar10, cifar100 or imagenet; that of the run unless given"""

    data_root: Path | None = None
    """folder of the data set; that of the run unless given"""

    workers: int | None = None
    """processes that decode ImageNet images; those of the run unless given"""

    precision: Literal["float32", "bf16", "float64"] = "float32"
    """bf16 is autocast"""

    mesh: MeshConfig = field(default_factory=MeshConfig)


def evaluate(argv: list[str]) -> None:
    config = parse(EvaluateConfig, "evaluate", argv)
    from twolevel.training.display import loss_text
    from twolevel.training.weights import evaluate_weights

    tested = evaluate_weights(
        config.path,
        config.weights,
        data=config.data,
        data_root=config.data_root,
        workers=config.workers,
        precision=config.precision,
        mesh=config.mesh,
    )
    if tested is not None:
        loss, error, images, not_finite = tested
        number = f"{images:,} images" + (f", {not_finite:,} of them not finite" if not_finite else "")
        print(
            f"test loss {loss_text(loss, 4)}  error {error:.2f} %  accuracy {100 - error:.2f} %  ({number})"
        )


@dataclass
class ExportConfig:
    """Write the whole network of a run or checkpoint into one file, for `twolevel.models.load`."""

    path: tyro.conf.Positional[Path]
    """folder of a run or a checkpoint"""

    output: tyro.conf.Positional[Path]
    """the .safetensors file to write"""

    weights: Literal["model", "ema"] = "model"
    """the weights themselves, or their exponential moving average"""


def export(argv: list[str]) -> None:
    config = parse(ExportConfig, "export", argv)
    from twolevel.distributed.environment import start, stop
    from twolevel.training.weights import Weights

    world = start("cpu")
    try:
        if world.size > 1:
            raise UserError(f"export writes one file and takes one process, not {world.size} ranks")
        weights = Weights.find(config.path, config.weights)
        weights.export(config.output)
    finally:
        stop(world)
    print(f"{config.output}: {weights.options['name']} from {weights.path}")


@dataclass
class ReportConfig:
    """Draw a run into its folder report/: its curve, and what its dgc, dgconv or flgc convolutions chose."""

    path: tyro.conf.Positional[Path]
    """folder of a run"""

    images: int | None = None
    """dgc: test images, each of another class, whose kept channels are drawn; 6 unless given"""

    batches: int | None = None
    """dgc: batches of 500 test images over which dropped channels are counted; 10 unless given"""

    data_root: Path | None = None
    """dgc: folder of the data set; that of the run unless given"""

    workers: int | None = None
    """dgc: processes that decode ImageNet images; those of the run unless given"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""


def report(argv: list[str]) -> None:
    config = parse(ReportConfig, "report", argv)
    from twolevel.training.report import write_report

    report = write_report(**asdict(config))
    for file, what in report.files.items():
        print(f"{file}  {what}")
    if report.note:
        print(report.note)


@dataclass
class CountConfig:
    """Count parameters, multiply-accumulates, and what a training step exchanges over the group axis."""

    model: ModelConfig = field(default_factory=ModelConfig)

    num_classes: int | None = None
    """classes; 10 for 32 x 32 images and 1000 for 224 x 224 unless given"""

    image_size: int | None = None
    """height and width of the images; that for which the network is made unless given"""

    batch_size: int = 128
    """images a step on one replica"""

    ranks: int | None = None
    """ranks of the group axis; one a group unless given"""

    precision: Literal["float32", "bf16"] = "float32"
    """type of the activations that are exchanged"""

    layers: bool = True
    """list every layer, not the sums alone"""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print JSON"""

    def __post_init__(self):
        check_least(self, 1, "num_classes", "image_size", "batch_size")


def count(argv: list[str]) -> None:
    config = parse(CountConfig, "count", argv)
    import torch

    from twolevel import models
    from twolevel.analysis import count as count_network
    from twolevel.analysis.report import count_table

    # The groups of these two are values, which the meta device has not.
    device = "cpu" if config.model.conv in ("flgc", "dgconv") else "meta"
    with torch.device(device):
        model = models.create(**config.model.create_options(), num_classes=config.num_classes)
    size = config.image_size or models.image_size(config.model.model)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    counted = count_network(
        model, (3, size, size), ranks=config.ranks, batch_size=config.batch_size, dtype=dtype
    )
    if config.json:
        print(json.dumps(asdict(counted) | counted.sums(), indent=1))
    else:
        count_table(counted, layers=config.layers)


@dataclass
class PlanConfig:
    """List every way to train a network on so many ranks, with memory, communication and time, and choose one."""

    model: str = "wrn-28-10"
    """network, as for train"""

    conv: Literal["gc2l", "gc"] = "gc2l"
    """convolution that group parallelism splits; its rivals train the dense one"""

    groups: tuple[int, ...] | None = None
    """numbers of groups; all powers of two that divide the channels unless given"""

    batch_size: int = 128
    """images a step, over all data-parallel ranks together"""

    ranks: int = 4
    """processors"""

    precision: Literal["float32", "bf16"] | None = None
    """bf16 is autocast; that of a measured machine, else float32, unless given"""

    machine: str | None = None
    """titan-rtx, v100, a100-40, a100-80, h100, h200, rtx-4090, or a file of --calibrate; what was measured here last
    unless given"""

    link: str | None = None
    """link within a node: nvlink-v100, nvlink-a100, nvlink-h100, pcie3, pcie4, loopback; the machine's unless given"""

    internode: str | None = None
    """link between nodes: infiniband-200g, infiniband-400g, infiniband-8x400g, ethernet-1g, -10g, -25g or -100g"""

    ranks_per_node: int | None = None
    """processors of a node; 8 unless given"""

    num_classes: int | None = None
    """classes; 10 for 32 x 32 images and 1000 for 224 x 224 unless given"""

    image_size: int | None = None
    """height and width of the images; that for which the network is made unless given"""

    epoch_images: int = 50_000
    """images of an epoch; CIFAR has 50,000, ImageNet 1,281,167"""

    scaling: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """time against processors, 1 to ranks, instead of one number of ranks"""

    wide_stem: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """wrn-D-k, on paper only: a stem of max(16, G) channels, so that more than 16 groups divide the network"""

    figure: Path | None = None
    """draw time against processors, 1 to ranks, into this file"""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print JSON"""

    calibrate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """measure this machine first, in a minute or two; its links too where a launcher started two ranks or more"""

    output: Path | None = None
    """calibrate: the file to write; one in the user's cache unless given"""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """calibrate: what to measure"""

    threads: int | None = None
    """calibrate: threads of torch on a CPU; as train has them unless given"""

    def __post_init__(self):
        check_least(self, 1, "num_classes", "image_size")


def plan(argv: list[str]) -> None:
    config = parse(PlanConfig, "plan", argv)
    from twolevel.analysis.planning.command import run

    run(config)


def doctor(argv: list[str]) -> None:
    if argv:
        print("usage: twolevel doctor\n\nSay what this machine has and what twolevel makes of it.")
        if argv[0] not in ("-h", "--help"):
            raise UserError(f"doctor takes no options, not {argv[0]!r}")
        sys.exit(0)
    from twolevel.doctor import examine

    for what, finding in examine():
        print(f"{what:14} {finding}")
