"""`twolevel count`: count parameters, multiply-accumulates and bytes exchanged."""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated

import tyro

from twolevel.cli.options import parse
from twolevel.settings import PlanPrecision
from twolevel.training.config import ModelConfig
from twolevel.training.validation import check_least


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

    precision: PlanPrecision = "float32"
    """type of the activations that are exchanged"""

    layers: bool = True
    """list every layer, not the sums alone"""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print JSON"""

    def __post_init__(self):
        check_least(self, 1, "num_classes", "image_size", "batch_size")


def run(argv: list[str]) -> None:
    config = parse(CountConfig, "count", argv)
    import torch

    from twolevel import models
    from twolevel.analysis import count
    from twolevel.analysis.count import countable
    from twolevel.analysis.report import count_table

    model = countable(**config.model.create_options(config.num_classes))
    size = config.image_size or models.image_size(config.model.model)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    counted = count(model, (3, size, size), ranks=config.ranks, batch_size=config.batch_size, dtype=dtype)
    if config.json:
        print(json.dumps(asdict(counted) | counted.sums(), indent=1))
    else:
        count_table(counted, layers=config.layers)
