"""From a configuration to a data set: `prepare` on one rank of a node, then `load` on every rank."""

import warnings

import torch

from twolevel.data import cifar, imagenet, sample
from twolevel.data.augment import Normalise
from twolevel.data.config import DataConfig
from twolevel.data.memory import EvalInMemory, TrainInMemory
from twolevel.data.order import Order
from twolevel.data.split import Data


def prepare(config: DataConfig) -> None:
    """Fetch the data set if `config.download` asks for it, verify it, and warn of settings without effect.

    To be called on one rank of each node, before the ranks call `load`, so that one fetches for all.

    Raises:
        UserError: the data set is missing or damaged, or cannot be fetched.
    """
    for name in config.ignored():
        warnings.warn(
            f"{name}={str(getattr(config, name))!r} is ignored: it has no effect on data={config.data!r}",
            stacklevel=2,
        )
    if config.data == "imagenet":
        imagenet.verify(config.data_root)
    elif config.data in cifar.SOURCES:
        if config.download:
            cifar.download(config.data, config.data_root)
        else:
            cifar.verify(config.data, config.data_root)


def load(
    config: DataConfig,
    *,
    seed: int,
    device: torch.device | str,
    data_rank: int = 0,
    data_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Data:
    """Data set `config.data` as data-parallel rank `data_rank` of `data_size` sees it; never downloads.

    Ranks that share a model (those of one `group` axis) pass the same `data_rank`, and get identical
    batches. Images are of type `dtype`; `seed` fixes the order, the crops and the flips.

    Raises:
        UserError: the data set is missing or damaged, or `config.batch_size` is more than it holds
            or does not divide over the ranks.
    """
    device = torch.device(device)
    if config.data == "imagenet":
        return _load_folder(config, seed, device, data_rank, data_size, dtype)
    if config.data == "sample":
        (train, test, classes), constants = sample.load_sample(), cifar.MEAN_STD["cifar10"]
    else:
        train, test, classes = cifar.read(config.data, config.data_root)
        constants = cifar.MEAN_STD[config.data]
    order = Order(len(train), config.batch_size, seed, data_rank, data_size)
    normalise = Normalise(*constants, device, dtype)
    return Data(
        train=TrainInMemory(train.to(device), normalise, order, config.augment),
        test=EvalInMemory(test.to(device), normalise, data_rank, data_size),
        num_classes=len(classes),
        classes=classes,
        image_shape=config.image_shape,
    )


def _load_folder(
    config: DataConfig,
    seed: int,
    device: torch.device,
    data_rank: int,
    data_size: int,
    dtype: torch.dtype,
) -> Data:
    classes = imagenet.verify(config.data_root)
    train, test = (
        imagenet.ImageFiles(config.data_root / split, config.image_size) for split in ("train", "val")
    )
    order = Order(len(train), config.batch_size, seed, data_rank, data_size)
    shared = (Normalise(*imagenet.MEAN_STD, device, dtype), device, config.workers)
    return Data(
        train=imagenet.TrainFolder(train, *shared, order, config.augment),
        test=imagenet.EvalFolder(test, *shared, data_rank, data_size),
        num_classes=len(classes),
        classes=classes,
        image_shape=config.image_shape,
    )
