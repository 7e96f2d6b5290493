"""What a run reads: the data set, its place and how it is cut into batches (imports no torch)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from twolevel.data.registry import DATA_SETS, DataSet, list_of_names
from twolevel.errors import UserError, unknown
from twolevel.settings import FIXED, FREE, Flip

# Settings that some data sets alone use.
NOT_OF_ALL = ("data_root", "download", "workers", "image_size")


@dataclass
class DataConfig:
    """The data set and its batches.

    Raises:
        UserError: a field has a value that cannot be honoured.
    """

    data: Annotated[str, tyro.conf.arg(help=f"data set: {list_of_names(about=True)}")] = field(
        default="sample", metadata=FIXED
    )

    data_root: Path = field(default=Path("data"), metadata=FREE)
    """folder of the data set: CIFAR as torchvision lays it out, or ImageNet's train/ and val/"""

    download: bool = field(default=False, metadata=FREE)
    """fetch CIFAR into data_root where it is missing or damaged"""

    batch_size: int | None = field(default=None, metadata=FIXED)
    """images a step, over all data-parallel ranks together; by the recipe unless given, most often 128"""

    augment: bool = True
    """random crops and flips of the training images"""

    flip: Flip | None = None
    """mirror training images at random, or each one every other epoch (alternating); by the recipe unless given"""

    workers: int = field(default=4, metadata=FREE)
    """processes of each rank that decode ImageNet images; 0 decodes in the rank itself"""

    image_size: int = 224
    """height and width of the ImageNet images after the crop"""

    def __post_init__(self) -> None:
        if self.data not in DATA_SETS:
            raise unknown("data set", self.data, DATA_SETS)
        self.data_root = Path(self.data_root).expanduser()
        for name, least in (("batch_size", 1), ("workers", 0), ("image_size", 1)):
            value = self.batch if name == "batch_size" else getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} is invalid; use an integer of {least} or more")
        if self.download and self.data_set.no_download:
            raise UserError(f"download=True: {self.data_set.no_download}")
        if self.flip == "alternating" and not self.data_set.in_memory:
            raise UserError(
                f"flip=alternating is not for data={self.data}, which is read image by image; use random"
            )

    @property
    def data_set(self) -> DataSet:
        """What is known of the data set before it is read."""
        return DATA_SETS[self.data]

    @property
    def batch(self) -> int:
        """Images a step; as published for the data set unless given."""
        return self.data_set.recipe.batch_size if self.batch_size is None else self.batch_size

    @property
    def num_classes(self) -> int:
        """Number of classes; for imagenet, the number of class folders in `data_root`/train.

        Raises:
            UserError: the ImageNet folder is missing or has no classes.
        """
        return self.data_set.num_classes or len(class_folders(self.data_root / "train"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (3, height, width) of one image as the network sees it."""
        size = self.data_set.image_size or self.image_size
        return (3, size, size)

    def ignored(self) -> list[str]:
        """The fields that differ from their default but have no effect on this data set."""
        without_effect = [name for name in NOT_OF_ALL if name not in self.data_set.uses]
        return [name for name in without_effect if getattr(self, name) != getattr(DataConfig, name)]


def class_folders(folder: Path) -> list[str]:
    """The classes of an ImageNet split: the names of the folders in `folder`, in sorted order.

    Raises:
        UserError: `folder` is missing or holds no folders.
    """
    if not folder.is_dir():
        raise UserError(
            f"imagenet needs the folder {folder}, which is missing; "
            "data_root has to hold train/<class>/<image> and val/<class>/<image>"
        )
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"{folder} has no class folders; imagenet expects {folder}/<class>/<image>")
    return classes
