"""Plain networks that take a convolution by name and know nothing of ranks."""

from twolevel.models.registry import NAMES, create
from twolevel.models.wide_resnet import WideResNet, wide_resnet, wide_resnet34_2

__all__ = ["NAMES", "WideResNet", "create", "wide_resnet", "wide_resnet34_2"]
