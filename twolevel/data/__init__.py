"""Data sets: CIFAR, ImageNet folders and the bundled sample, with augmentation on the device.

prepare(config)                             on one rank of a node: fetch and verify
data = load(config, seed=0, device="cpu")   on every rank
for images, labels in data.train.batches(epoch): ...
for images, labels in data.test.eval_batches(500): ...
"""

from typing import TYPE_CHECKING, Any

from twolevel.data.config import DataConfig

if TYPE_CHECKING:
    from twolevel.data.loading import load, prepare
    from twolevel.data.split import Data

__all__ = ["Data", "DataConfig", "load", "prepare"]


def __getattr__(name: str) -> Any:
    # Importing the configuration must not import torch: `twolevel --help` needs the one only.
    if name in ("load", "prepare"):
        from twolevel.data import loading

        return getattr(loading, name)
    if name == "Data":
        from twolevel.data.split import Data

        return Data
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
