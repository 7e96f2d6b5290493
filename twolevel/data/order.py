"""Which images make a batch: a function of (seed, epoch, position), for any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from twolevel.errors import UserError
from twolevel.streams import stream


def share(num_images: int, data_rank: int, data_size: int) -> range:
    """The images of `data_rank`, where `data_size` ranks share `num_images` as evenly as they can."""
    return range(num_images * data_rank // data_size, num_images * (data_rank + 1) // data_size)


@dataclass(frozen=True)
class Order:
    """The order in which data rank `data_rank` of `data_size` sees `num_images` training images.

    Raises:
        UserError: a batch is larger than the split, or does not divide over the ranks.
    """

    num_images: int
    batch_size: int
    seed: int
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size
        if self.batch_size > self.num_images:
            raise UserError(
                f"batch_size={self.batch_size} is more than the {self.num_images} training images; "
                f"use at most {self.num_images}"
            )
        if self.batch_size % self.data_size:
            below = self.batch_size // self.data_size * self.data_size
            raise UserError(
                f"batch_size={self.batch_size} does not divide over {self.data_size} data-parallel ranks; "
                f"use a multiple of {self.data_size} such as {below or self.data_size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in the split."""
        return self.num_images // self.batch_size

    @property
    def rows(self) -> slice:
        """The rows of a global batch that this rank is given."""
        size = self.batch_size // self.data_size
        return slice(self.data_rank * size, (self.data_rank + 1) * size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(position, indices [b/D] int64 on the CPU) of the batches of `epoch` from `start` on.

        Raises:
            UserError: `start` is not within the epoch.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise UserError(
                f"start={start} is not a batch of an epoch of {self.steps_per_epoch} batches; "
                "was the batch size changed since the checkpoint was written?"
            )
        permutation = torch.randperm(self.num_images, generator=stream("order", self.seed, epoch))
        for position in range(start, self.steps_per_epoch):
            batch = permutation[position * self.batch_size : (position + 1) * self.batch_size]
            yield position, batch[self.rows]
