"""`twolevel grid`: train the runs of a published table or figure, or of a grid of one's own."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from twolevel.cli.options import parse
from twolevel.errors import UserError
from twolevel.grids import declare
from twolevel.launchers import rank_of
from twolevel.settings import Device
from twolevel.terminal import program
from twolevel.training.validation import check_least

if TYPE_CHECKING:
    from twolevel.grids.runner import Place

_NAMES = ", ".join(declare.names())


@dataclass
class GridConfig:
    """Train every run of a grid that has no line of results yet; go on with the same command where it was stopped."""

    grid: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(help=f"{_NAMES}, or a TOML file that declares another")
    ]

    output: Path | None = None
    """folder of the runs at work; runs/grids/GRID unless given"""

    lines: Path | None = None
    """results, a JSON line for each finished run, which is not trained again; by default OUTPUT/results.jsonl"""

    seeds: tuple[int, ...] | None = None
    """seeds instead of the grid's"""

    at_once: int | None = None
    """ranks that train at the same time (a run of 2 ranks counts as 2); one for each GPU, or each core, unless given"""

    data_root: Path = field(default=Path("data"))
    """folder of the data sets"""

    download: bool = False
    """fetch CIFAR into data_root where it is missing"""

    device: Device = "auto"
    """where to compute"""

    keep: bool = False
    """keep the folders of finished runs, with their checkpoints"""

    list: bool = False
    """list the runs, with the results that there are, and train nothing"""

    def __post_init__(self):
        check_least(self, 1, "at_once")
        if self.lines is not None and (self.lines.suffix != ".jsonl" or self.lines.is_dir()):
            raise UserError(f"lines={self.lines} is invalid; name a file that ends in .jsonl")
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            raise UserError(f"output={self.output} is a file; name a folder")


def run(argv: list[str]) -> None:
    config = parse(GridConfig, "grid", argv)
    if rank_of() is not None:
        raise UserError("a grid starts the ranks of its runs itself; call it without a launcher")
    grid = declare.read(config.grid, config.seeds)
    output = config.output or Path("runs", "grids", grid.name)
    lines = config.lines or output / "results.jsonl"
    if config.list:
        _list(grid, lines)
        return
    from twolevel.grids.runner import Runner

    options = ["--data-root", str(config.data_root), "--device", config.device]
    options += ["--download"] if config.download else []
    runner = Runner(grid, output, lines, _places(config), options, config.keep)
    found = runner.run()
    elsewhere = f"; {runner.elsewhere} are trained by another process" if runner.elsewhere else ""
    print(f"{lines}  {len(found)} of {len(grid.runs)} runs{elsewhere}")
    print(f"page        {program()} report {lines}")


def _list(grid: declare.Grid, lines: Path) -> None:
    from twolevel.grids import results

    found = results.read(lines)
    for one in grid.runs:
        line = results.find(found, one)
        print(f"{one.name}  " + ("-" if line is None else f"{line['final']['test_error']:.2f} %"))


def _places(config: GridConfig) -> "list[Place]":
    """Room for a rank each: a GPU of its own, or a share of the cores."""
    import torch

    from twolevel.grids.runner import Place
    from twolevel.host import usable_cores

    cores = len(usable_cores())
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if gpus:
        if config.at_once is not None and config.at_once > gpus:
            raise UserError(
                f"at_once={config.at_once} is more than the {gpus} GPUs here, of which each rank takes one"
            )
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        shown = shown[: config.at_once]
        return [Place(max(1, cores // len(shown)), gpu) for gpu in shown]
    if config.device == "cuda":
        raise UserError("device=cuda, but PyTorch finds no GPU; use --device cpu")
    number = config.at_once or cores
    return [Place(max(1, cores // number))] * number
