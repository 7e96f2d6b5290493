"""From a configuration to a data set: `prepare` on one rank of a node, then `load` on every rank."""

import importlib
import warnings
from typing import Protocol, cast

import torch

from twolevel.data.config import DataConfig
from twolevel.data.split import Data, View


class DataSetModule(Protocol):
    """What the module of a data set has; see `twolevel.data.registry`."""

    def prepare(self, config: DataConfig) -> None: ...

    def load(self, config: DataConfig, view: View) -> Data: ...


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
    _module(config).prepare(config)


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
    view = View(seed=seed, device=torch.device(device), dtype=dtype, data_rank=data_rank, data_size=data_size)
    data, line = _module(config).load(config, view), config.data_set
    said = (line.num_classes or data.num_classes, line.image_size or data.image_shape[-1])
    found = (data.num_classes, data.image_shape[-1])
    assert said == found, (
        f"DATA_SETS[{config.data!r}] says (num_classes, image_size) = {said}; loaded were {found}"
    )
    return data


def _module(config: DataConfig) -> DataSetModule:
    return cast(DataSetModule, importlib.import_module(f"twolevel.data.{config.data_set.module}"))
