"""ImageNet as folders, train/<class>/<image> and val/<class>/<image>, decoded by workers."""

import errno
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as TF

from twolevel.data.augment import Normalise, draw_resized_crop
from twolevel.data.config import DataConfig, class_folders
from twolevel.data.order import Order, share
from twolevel.data.split import Data, View
from twolevel.data.starved import starved, starved_is_said
from twolevel.errors import UserError
from twolevel.streams import stream

MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of each channel, as torchvision's models use them."""

RESIZE = 256 / 224
"""How much larger than the crop the shorter side is made for testing (Krizhevsky et al., 2012)."""

SPARE_FILES = 12
"""Files that a worker opens to hand over the batches on their way: two for each tensor of one, and a socket."""

Job = tuple[list[int], tuple[int, int, int] | None]
"""The images of one batch; to augment them, also (seed, epoch, place in the epoch of the first)."""


def prepare(config: DataConfig) -> None:
    """Verify the folders. Raises UserError as `verify` does."""
    verify(config.data_root)


def load(config: DataConfig, view: View) -> Data:
    """The folders as a rank sees them.

    Raises:
        UserError: as `verify`; a class without images; a batch that is too large or does not divide over the ranks.
    """
    classes = verify(config.data_root)
    train, test = (ImageFiles(config.data_root / split, config.image_size) for split in ("train", "val"))
    order = Order(len(train), config.batch, view.seed, view.data_rank, view.data_size)
    normalise = Normalise(*MEAN_STD, view.device, view.dtype)
    return Data(
        train=TrainFolder(train, normalise, view.device, config.workers, order, config.augment),
        test=EvalFolder(test, normalise, view.device, config.workers, view.data_rank, view.data_size),
        num_classes=len(classes),
        classes=classes,
        image_shape=config.image_shape,
        normalise=normalise,
    )


def verify(root: Path) -> list[str]:
    """The classes of both splits.

    Raises:
        UserError: a split is missing or empty, or they have different classes.
    """
    train, val = (class_folders(root / split) for split in ("train", "val"))
    if train != val:
        odd = sorted(set(train) ^ set(val))
        some = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
        raise UserError(
            f"{root}/train and {root}/val differ in {len(odd)} classes ({some}); "
            "each needs a folder of the same name for every class"
        )
    return train


class ImageFiles(Dataset):
    """The images of one split; what one reads from it is a whole batch, by its `Job`."""

    def __init__(self, folder: Path, image_size: int) -> None:
        source = ImageFolder(folder, allow_empty=True)
        if empty := sorted(set(range(len(source.classes))).difference(source.targets)):
            raise UserError(
                f"{folder / source.classes[empty[0]]} holds no images; "
                "every class of imagenet needs at least one"
            )
        # An array: a list's million strings would be copied into every worker as it counts references.
        self.paths = np.array([os.fsencode(path) for path, _ in source.samples])
        self.labels = torch.tensor(source.targets)
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Where an image is."""
        return Path(os.fsdecode(self.paths[index]))

    def __getitem__(self, job: Job) -> tuple[Tensor, Tensor] | UserError:
        """Images [B, 3, S, S] (uint8) and labels [B], or what stands against them.

        An error is returned, not raised: the loader would wrap it into the traceback of its worker.
        """
        index, key = job
        images = []
        for row, i in enumerate(index):
            try:
                image = decode(self.path(i))
            except UserError as error:
                return error
            if key is None:
                images.append(centre_crop(image, self.image_size))
            else:
                seed, epoch, first = key
                generator = stream("image", seed, epoch, first + row)
                images.append(random_crop(image, self.image_size, generator))
        return _shared(torch.stack(images), self.labels[index])


def random_crop(image: Image.Image, size: int, generator: torch.Generator) -> Tensor:
    """A random part of the image, resized to [3, size, size] (uint8) and mirrored half of the time."""
    box = draw_resized_crop(image.height, image.width, generator)
    cropped: Any = TF.resized_crop(_typed(image), *box, size=[size, size])
    if torch.randint(0, 2, (), generator=generator):
        cropped = TF.horizontal_flip(cropped)
    return TF.pil_to_tensor(cropped)


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """The centre [3, size, size] (uint8) of the image, whose shorter side is first made 256/224 of that."""
    resized: Any = TF.resize(_typed(image), [round(size * RESIZE)])
    return TF.pil_to_tensor(TF.center_crop(resized, [size, size]))


def _typed(image: Image.Image) -> Any:
    """The image: torchvision's functions take it, but their annotations say tensors only."""
    return image


def decode(path: Path) -> Image.Image:
    """An image of the disk. Raises UserError where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise what they like on damaged data
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise UserError(starved(error) or str(error)) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable image ({reason}); replace or remove it") from None


def _shared(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | UserError:
    """A batch in the memory that a worker shares with its parent, or why there is none.

    The loader would put it there in another thread, whose failure its parent never hears of.
    """
    try:
        if get_worker_info():
            images.share_memory_()
            labels.share_memory_()
            _try_open(SPARE_FILES)
        return images, labels
    except (RuntimeError, OSError) as error:
        return UserError(starved(error) or str(error).splitlines()[0])


def _try_open(number: int) -> None:
    """Raise OSError unless this process may open so many more files."""
    opened = []
    try:
        for _ in range(number):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for file in opened:
            os.close(file)


def _leave_signals_to_parent(worker: int) -> None:
    """Schedulers and terminals signal every process of a run: its last steps still need images.

    A worker ends with its parent, or when the parent has no more work for it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Folder:
    """What both splits share: files, the processes that decode them, and the way to the device."""

    def __init__(self, files: ImageFiles, normalise: Normalise, device: torch.device, workers: int):
        self.files = files
        self.normalise = normalise
        self.device = device
        self.workers = workers

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, jobs: Iterable[Job]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.files,
            batch_size=None,  # a job is a whole batch
            sampler=jobs,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the process's global stream
            worker_init_fn=_leave_signals_to_parent,
        )
        for batch in starved_is_said(loader, self.workers):
            if isinstance(batch, UserError):
                raise batch
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield self.normalise(images), labels


class TrainFolder(_Folder):
    """A `TrainSplit` of a folder of images."""

    def __init__(
        self,
        files: ImageFiles,
        normalise: Normalise,
        device: torch.device,
        workers: int,
        order: Order,
        augment: bool,
    ) -> None:
        super().__init__(files, normalise, device, workers)
        self.order = order
        self.augment = augment

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return self._read(self._jobs(epoch, start))

    def _jobs(self, epoch: int, start: int) -> Iterator[Job]:
        order = self.order
        for position, index in order.batches(epoch, start):
            first = position * order.batch_size + order.rows.start
            yield index.tolist(), (order.seed, epoch, first) if self.augment else None


class EvalFolder(_Folder):
    """An `EvalSplit` of a folder of images."""

    def __init__(
        self,
        files: ImageFiles,
        normalise: Normalise,
        device: torch.device,
        workers: int,
        data_rank: int,
        data_size: int,
    ) -> None:
        super().__init__(files, normalise, device, workers)
        self.share = share(len(files), data_rank, data_size)

    def eval_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        whole = range(0, len(self.share), batch_size)
        return self._read((list(self.share[i : i + batch_size]), None) for i in whole)
