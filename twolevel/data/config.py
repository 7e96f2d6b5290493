"""What a run reads: the data set, its place and how it is cut into batches (imports no torch)."""

from dataclasses import dataclass, field
from pathlib import Path

from twolevel.errors import UserError, unknown
from twolevel.settings import FIXED, FREE

NUM_CLASSES = {"sample": 10, "cifar10": 10, "cifar100": 100}
"""The data sets of 32 x 32 images; the remaining one, imagenet, has the classes of its folder."""

DATA_SETS = (*NUM_CLASSES, "imagenet")


@dataclass
class DataConfig:
    """The data set and its batches.

    Raises:
        UserError: a field has a value that cannot be honoured.
    """

    data: str = field(default="sample", metadata=FIXED)
    """data set: sample (2,500 CIFAR-10 images in the package), cifar10, cifar100 or imagenet"""

    data_root: Path = field(default=Path("data"), metadata=FREE)
    """folder of the data set: CIFAR as torchvision lays it out, or ImageNet's train/ and val/"""

    download: bool = field(default=False, metadata=FREE)
    """fetch CIFAR into data_root where it is missing or damaged"""

    batch_size: int = field(default=128, metadata=FIXED)
    """images a step, over all data-parallel ranks together"""

    augment: bool = True
    """random crops and flips of the training images"""

    workers: int = field(default=4, metadata=FREE)
    """processes of each rank that decode ImageNet images; 0 decodes in the rank itself"""

    image_size: int = 224
    """height and width of the ImageNet images after the crop"""

    def __post_init__(self) -> None:
        if self.data not in DATA_SETS:
            raise unknown("data set", self.data, DATA_SETS)
        self.data_root = Path(self.data_root).expanduser()
        for name, least in (("batch_size", 1), ("workers", 0), ("image_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} is invalid; use an integer of {least} or more")
        if self.download and self.data == "imagenet":
            raise UserError(
                "download=True: imagenet has to be asked for at image-net.org; "
                "put its train/ and val/ under data_root and leave download out"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes; for imagenet, the number of class folders in `data_root`/train.

        Raises:
            UserError: the ImageNet folder is missing or has no classes.
        """
        if self.data == "imagenet":
            return len(class_folders(self.data_root / "train"))
        return NUM_CLASSES[self.data]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (3, height, width) of one image as the network sees it."""
        size = self.image_size if self.data == "imagenet" else 32
        return (3, size, size)

    def ignored(self) -> list[str]:
        """The fields that differ from their default but have no effect on this data set."""
        without_effect = {
            "sample": ("data_root", "download", "workers", "image_size"),
            "cifar10": ("workers", "image_size"),
            "cifar100": ("workers", "image_size"),
            "imagenet": (),
        }
        return [n for n in without_effect[self.data] if getattr(self, n) != getattr(DataConfig, n)]


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
