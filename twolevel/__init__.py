"""Train wide convolutional networks, their convolutions split by channel group over processors."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twolevel import analysis, data, distributed, models, nn, ops, training
    from twolevel.nn import convert

__version__ = "0.1.0"
__all__ = ["analysis", "convert", "data", "distributed", "models", "nn", "ops", "training"]


def __getattr__(name: str) -> Any:
    # On first use: `twolevel --help` imports this package and must not wait for torch.
    if name == "convert":
        return importlib.import_module("twolevel.nn").convert
    if name in __all__:
        return importlib.import_module(f"twolevel.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
