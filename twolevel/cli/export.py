"""`twolevel export`: write the whole network of a run into one file."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from twolevel.cli.options import parse
from twolevel.errors import UserError
from twolevel.settings import ExportFormat, WeightsOf


@dataclass
class ExportConfig:
    """Write the whole network of a run or checkpoint into one file, which is compared with the network if it is a
    program: for `twolevel.models.load`, for torch without twolevel, or for ONNX run times.
    """

    path: tyro.conf.Positional[Path]
    """folder of a run or a checkpoint; for torch and onnx also a .safetensors file that was exported"""

    output: tyro.conf.Positional[Path]
    """the file to write: .safetensors, .pt2 (torch) or .onnx"""

    format: ExportFormat | None = None
    """by the suffix of the file unless given; torch is a program of torch.export, onnx needs twolevel[onnx]"""

    weights: WeightsOf = "model"
    """the weights themselves, or their exponential moving average"""


def run(argv: list[str]) -> None:
    config = parse(ExportConfig, "export", argv)
    from twolevel.distributed.environment import start, stop
    from twolevel.models.exporting.formats import format_of
    from twolevel.training.weights import Weights

    format = format_of(config.output, config.format)
    world = start("cpu")
    try:
        if world.size > 1:
            raise UserError(f"export writes one file and takes one process, not {world.size} ranks")
        weights = Weights.find(config.path, config.weights)
        exported = weights.export(config.output, format)
    finally:
        stop(world)
    print(f"{config.output}: {weights.options['name']} from {weights.path}")
    if exported is not None:
        print(exported)
