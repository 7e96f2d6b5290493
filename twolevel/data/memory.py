"""Data sets small enough to live on the training device as bytes, augmented there in batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twolevel.data.augment import Normalise, crop_and_flip, draw_crops
from twolevel.data.config import DataConfig
from twolevel.data.order import Order, share
from twolevel.data.split import Data, View
from twolevel.settings import Flip
from twolevel.streams import stream


@dataclass(frozen=True)
class LabelledImages:
    """Images [N, 3, H, W] (uint8) and their labels [N] (int64)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "LabelledImages":
        """The same on `device`, planes contiguous: the layout in which selecting images is quickest."""
        return LabelledImages(self.images.to(device).contiguous(), self.labels.to(device))


class TrainInMemory:
    """A `TrainSplit` of images on the device.

    `flip` "alternating" mirrors each image every other epoch, half of them in the even ones: two epochs show every
    image both ways, where random flips would show half of them the same way twice (Jordan, arXiv 2404.00498).
    """

    def __init__(
        self, data: LabelledImages, normalise: Normalise, order: Order, augment: bool, flip: Flip = "random"
    ) -> None:
        self.data = data
        self.normalise = normalise
        self.order = order
        self.augment = augment
        self.mirrored = None  # in even epochs: which images
        if flip == "alternating":
            self.mirrored = torch.randint(0, 2, (len(data),), generator=stream("flips", order.seed))

    def __len__(self) -> int:
        return len(self.data)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order
        for position, index in order.batches(epoch, start):
            if self.augment:
                # Drawn for the global batch, then cut: an image's crop does not depend on the ranks.
                generator = stream("crops", order.seed, epoch, position)
                crops = draw_crops(order.batch_size, generator)[:, order.rows]
                if self.mirrored is not None:
                    crops[2] = self.mirrored[index] ^ (epoch & 1)
                index, dy, dx, flip = self._to_device(torch.cat((index[None], crops)))
                images = crop_and_flip(self.data.images.index_select(0, index), dy, dx, flip)
            else:
                index = self._to_device(index)
                images = self.data.images.index_select(0, index)
            yield self.normalise(images), self.data.labels.index_select(0, index)

    def _to_device(self, values: Tensor) -> Tensor:
        device = self.data.labels.device
        if device.type == "cuda":  # a copy from pageable memory may wait for the device
            values = values.pin_memory()
        return values.to(device, non_blocking=True)


class EvalInMemory:
    """An `EvalSplit` of images on the device."""

    def __init__(self, data: LabelledImages, normalise: Normalise, data_rank: int, data_size: int) -> None:
        self.data = data
        self.normalise = normalise
        self.share = share(len(data), data_rank, data_size)

    def __len__(self) -> int:
        return len(self.data)

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(self.share.start, self.share.stop, batch_size):
            rows = slice(begin, min(begin + batch_size, self.share.stop))
            yield self.normalise(self.data.images[rows]), self.data.labels[rows]


def in_memory(
    config: DataConfig,
    view: View,
    *,
    train: LabelledImages,
    test: LabelledImages,
    classes: list[str],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Data:
    """A data set of these images, moved to the device of `view`; `mean` and `std` of each channel normalise them.

    Raises:
        UserError: a batch is more than the training images, or does not divide over the ranks.
    """
    order = Order(len(train), config.batch, view.seed, view.data_rank, view.data_size)
    normalise = Normalise(mean, std, view.device, view.dtype)
    return Data(
        train=TrainInMemory(train.to(view.device), normalise, order, config.augment, config.flip or "random"),
        test=EvalInMemory(test.to(view.device), normalise, view.data_rank, view.data_size),
        num_classes=len(classes),
        classes=classes,
        image_shape=config.image_shape,
        normalise=normalise,
    )
