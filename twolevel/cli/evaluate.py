"""`twolevel evaluate`: test a run, a checkpoint or an exported file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from twolevel.cli.options import parse
from twolevel.data.registry import list_of_names
from twolevel.errors import UserError
from twolevel.settings import Precision, WeightsOf
from twolevel.training.config import MeshConfig

_NAMES = list_of_names(about=False)


@dataclass
class EvaluateConfig:
    """Test a run (its newest checkpoint), one checkpoint, or an exported file, on any number of ranks."""

    path: tyro.conf.Positional[Path]
    """folder of a run or a checkpoint, or a .safetensors file"""

    weights: WeightsOf = "model"
    """the weights themselves, or their exponential moving average"""

    data: Annotated[str | None, tyro.conf.arg(help=f"data set: {_NAMES}; that of the run unless given")] = (
        None
    )

    data_root: Path | None = None
    """folder of the data set; that of the run unless given"""

    workers: int | None = None
    """processes that decode ImageNet images; those of the run unless given"""

    mirrored: bool = False
    """also test with the mean of the outputs for each image and its mirror image"""

    precision: Precision = "float32"
    """bf16 is autocast"""

    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if self.mesh.mesh == "auto":
            raise UserError("mesh=auto is of a run; leave it out, or name --data-parallel")


def run(argv: list[str]) -> None:
    config = parse(EvaluateConfig, "evaluate", argv)
    from twolevel.training.display import loss_text
    from twolevel.training.weights import evaluate_weights

    tested = evaluate_weights(
        config.path,
        config.weights,
        data=config.data,
        data_root=config.data_root,
        workers=config.workers,
        mirrored=config.mirrored,
        precision=config.precision,
        mesh=config.mesh,
    )
    if tested is not None:
        loss, error, images, not_finite, mirrored_error = tested
        number = f"{images:,} images" + (f", {not_finite:,} of them not finite" if not_finite else "")
        both = "" if mirrored_error is None else f"  with mirror images {100 - mirrored_error:.2f} %"
        print(
            f"test loss {loss_text(loss, 4)}  error {error:.2f} %  accuracy {100 - error:.2f} %{both}  ({number})"
        )
