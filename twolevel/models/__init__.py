"""Plain networks that take a convolution by name and know nothing of ranks."""

from twolevel.models.exporting.export import Exported, export
from twolevel.models.files import load
from twolevel.models.public import load_public
from twolevel.models.registry import NAMES, create, image_size
from twolevel.models.wide_resnet import WideResNet, wide_resnet, wide_resnet34_2

__all__ = [
    "NAMES",
    "Exported",
    "WideResNet",
    "create",
    "export",
    "image_size",
    "load",
    "load_public",
    "wide_resnet",
    "wide_resnet34_2",
]
