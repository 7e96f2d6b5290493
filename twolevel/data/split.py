"""What the training loop sees of a data set, whichever it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from twolevel.data.augment import Normalise


class TrainSplit(Protocol):
    """The training images, as one data-parallel rank sees them."""

    def __len__(self) -> int:
        """Number of images on all ranks together."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch. The last, partial batch is left out.

        A batch of another size would weigh its images differently and need not divide over ranks.
        No image is lost for good: an epoch has its own permutation and leaves other images out.
        """
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... of `epoch`; those before `start` are not computed.

        Global batch i is a pure function of (seed, epoch, i). Of its b images, data rank d of D is
        given rows [d b/D, (d+1) b/D): images [b/D, 3, H, W], normalised, augmented, in channels_last
        memory, and labels [b/D] (int64), both on the training device.

        Raises:
            UserError: `start` is not within the epoch.
        """
        ...


class EvalSplit(Protocol):
    """The test images, as one data-parallel rank sees them."""

    def __len__(self) -> int:
        """Number of images on all ranks together."""
        ...

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the images, once each, unaugmented, at most `batch_size` at a time.

        The shares of the data ranks are disjoint, cover the split, and differ by at most one image;
        so ranks may yield different numbers of batches, and one with an empty share yields none.
        Images [<= batch_size, 3, H, W] are normalised and in channels_last memory; labels are int64.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class View:
    """How one rank sees a data set: its share of it, and its device and type.

    Data rank `data_rank` of `data_size`; `seed` fixes the order, the crops and the flips.
    """

    seed: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    data_rank: int = 0
    data_size: int = 1


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, ready to train on."""

    train: TrainSplit
    test: EvalSplit
    num_classes: int
    classes: list[str]
    image_shape: tuple[int, int, int]
    normalise: Normalise
    """What the bytes of both splits went through; a picture of an image undoes it."""
