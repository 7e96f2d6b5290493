"""Train wide convolutional networks, their convolutions split by channel group over processors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twolevel.nn import convert

__version__ = "0.1.0"
__all__ = ["convert"]


def __getattr__(name: str) -> Any:
    # `twolevel --help` imports this package and must not wait for torch.
    if name == "convert":
        from twolevel.nn import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
