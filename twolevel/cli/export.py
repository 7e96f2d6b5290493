"""`twolevel export`: write the whole network of a run into one safetensors file."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from twolevel.cli.options import parse
from twolevel.errors import UserError
from twolevel.settings import WeightsOf


@dataclass
class ExportConfig:
    """Write the whole network of a run or checkpoint into one file, for `twolevel.models.load`."""

    path: tyro.conf.Positional[Path]
    """folder of a run or a checkpoint"""

    output: tyro.conf.Positional[Path]
    """the .safetensors file to write"""

    weights: WeightsOf = "model"
    """the weights themselves, or their exponential moving average"""


def run(argv: list[str]) -> None:
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
