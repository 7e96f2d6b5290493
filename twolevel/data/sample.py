"""The bundled sample: 2,000 training and 500 test images of CIFAR-10, so that all runs at once.

The first 200 training and the first 50 test images of each class, in file order, lossless.
Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).

    python -m twolevel.data.sample ROOT      rebuild it from CIFAR-10 in torchvision's layout under ROOT
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from twolevel.data import cifar
from twolevel.data.config import DataConfig
from twolevel.data.memory import LabelledImages, in_memory
from twolevel.data.registry import CIFAR_CITATION
from twolevel.data.split import Data, View
from twolevel.errors import UserError

FOLDER = Path(__file__).parent / "bundled"
IMAGES_PER_CLASS = {"train": 200, "test": 50}
COLUMNS = 25
"""Images in a row of a sheet: both splits fill whole rows."""


def prepare(config: DataConfig) -> None:
    """Nothing: the sample is in the package."""


def load(config: DataConfig, view: View) -> Data:
    """The sample as a rank sees it. Raises UserError as `load_sample` and `in_memory` do."""
    train, test, classes = load_sample()
    mean, std = cifar.MEAN_STD["cifar10"]
    return in_memory(config, view, train=train, test=test, classes=classes, mean=mean, std=std)


def load_sample(folder: Path = FOLDER) -> tuple[LabelledImages, LabelledImages, list[str]]:
    """The training images, the test images and the names of the classes.

    Raises:
        UserError: a file of the installed package is missing or damaged.
    """
    try:
        facts = json.loads((folder / "labels.json").read_text())
        train, test = (
            LabelledImages(_read_sheet(folder / f"{split}.webp"), torch.tensor(facts[split]))
            for split in ("train", "test")
        )
        return train, test, facts["classes"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the bundled sample is damaged ({error}); install twolevel again") from None


def build(root: Path, folder: Path = FOLDER) -> None:
    """Write the sample's sheets and labels into `folder`, from CIFAR-10 under `root`.

    Raises:
        UserError: CIFAR-10 is missing or damaged.
    """
    train, test, classes = cifar.read("cifar10", root)
    facts: dict[str, object] = {"from": "CIFAR-10", "cite": CIFAR_CITATION, "classes": classes}
    folder.mkdir(exist_ok=True)
    for split, data in (("train", train), ("test", test)):
        chosen = first_of_each_class(data.labels, IMAGES_PER_CLASS[split])
        _write_sheet(folder / f"{split}.webp", data.images[chosen])
        facts[split] = data.labels[chosen].tolist()
    (folder / "labels.json").write_text(json.dumps(facts) + "\n")


def first_of_each_class(labels: Tensor, num: int) -> Tensor:
    """The indices of the first `num` images of every class, in ascending order."""
    each = [torch.nonzero(labels == label)[:num, 0] for label in labels.unique()]
    return torch.cat(each).sort().values


def _write_sheet(path: Path, images: Tensor) -> None:
    """Tile images [N, 3, 32, 32], row by row, into one lossless WebP picture."""
    rows = len(images) // COLUMNS
    tiles = images.view(rows, COLUMNS, 3, 32, 32).permute(0, 3, 1, 4, 2)
    sheet = tiles.reshape(rows * 32, COLUMNS * 32, 3).numpy()
    Image.fromarray(sheet).save(path, lossless=True, quality=90, method=6)


def _read_sheet(path: Path) -> Tensor:
    """The images [N, 3, 32, 32] of a sheet."""
    with Image.open(path) as picture:
        sheet = torch.from_numpy(np.array(picture.convert("RGB")))
    rows = len(sheet) // 32
    tiles = sheet.view(rows, 32, COLUMNS, 32, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(rows * COLUMNS, 3, 32, 32)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    try:
        build(Path(sys.argv[1]))
    except UserError as error:
        raise SystemExit(str(error)) from None
