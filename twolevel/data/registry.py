"""The data sets by name: a module and a line each (imports no torch).

The module has two functions, and the line of DATA_SETS says what is known before anything is read:

    prepare(config)        on one rank of each node: fetch the data set if `config.download`, and verify it
    load(config, view)     on every rank: a `Data`, by `memory.in_memory` where it fits the device's memory
"""

from collections.abc import Mapping
from dataclasses import dataclass

from twolevel.settings import Flip, LRSchedule, Update

CIFAR_CITATION = 'Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009'


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings that a run has unless others are given."""

    epochs: int
    weight_decay: float
    batch_size: int = 128
    update: Update = "momentum"
    learning_rate: float = 0.1
    lr_matrices: float | None = None
    lr_schedule: LRSchedule = "multistep"
    lr_milestones: tuple[int, ...] | None = None
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    flip: Flip = "random"


# Lee, Park, Lee, "Two-level Group Convolution", section 4; the digits of the decay are not in the paper and are the
# conventional ones.
CIFAR_RECIPE = Recipe(epochs=200, lr_milestones=(60, 120, 160), weight_decay=5e-4)
IMAGENET_RECIPE = Recipe(epochs=90, lr_milestones=(30, 60), weight_decay=1e-4)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is known of a data set before it is read.

    `uses` are the settings that have an effect on it, of those that not all data sets have.
    """

    module: str
    """of this package"""
    about: str = ""
    """beside its name in the help"""
    num_classes: int | None = None
    """None: one for each folder in data_root/train"""
    train_images: int | None = None
    """None: those of the folders in data_root/train"""
    image_size: int | None = None
    """height and width of an image; None: as image_size asks"""
    uses: tuple[str, ...] = ("data_root",)
    in_memory: bool = True
    """on the device of a rank, as bytes"""
    recipe: Recipe = CIFAR_RECIPE
    """as published for it"""
    no_download: str = ""
    """what to do instead of downloading it, where a user may expect that"""
    citation: str = ""
    """whom a picture of its images cites"""


DATA_SETS: Mapping[str, DataSet] = {
    "sample": DataSet(
        module="sample",
        about="2,500 CIFAR-10 images in the package",
        num_classes=10,
        train_images=2_000,
        image_size=32,
        uses=(),
        citation=CIFAR_CITATION,
    ),
    "cifar10": DataSet(
        module="cifar",
        num_classes=10,
        train_images=50_000,
        image_size=32,
        uses=("data_root", "download"),
        citation=CIFAR_CITATION,
    ),
    "cifar100": DataSet(
        module="cifar",
        num_classes=100,
        train_images=50_000,
        image_size=32,
        uses=("data_root", "download"),
        citation=CIFAR_CITATION,
    ),
    "imagenet": DataSet(
        module="imagenet",
        uses=("data_root", "workers", "image_size"),
        in_memory=False,
        recipe=IMAGENET_RECIPE,
        no_download="imagenet has to be asked for at image-net.org; "
        "put its train/ and val/ under data_root and leave download out",
    ),
}


def list_of_names(*, about: bool) -> str:
    """The names as the help lists them, with what they are if `about`."""
    *names, last = (
        f"{name} ({data.about})" if about and data.about else name for name, data in DATA_SETS.items()
    )
    return f"{', '.join(names)} or {last}"
