"""ResNet (He et al., arXiv 1512.03385) and ResNeXt (Xie et al., arXiv 1611.05431): torchvision's, converted."""

from typing import Any

from torch import nn
from torchvision import models

from twolevel.errors import UserError
from twolevel.nn import convert


def resnet(
    name: str, *, conv: str = "sc", groups: int = 1, num_classes: int = 1000, **options: Any
) -> nn.Module:
    """`resnet18` or `resnet50` for images of 224 x 224, every convolution but the stem of kind `conv`.

    Down-sampling 1x1 convolutions are among them.
    """
    model = getattr(models, name)(num_classes=num_classes)
    return model if conv == "sc" else convert(model, conv, groups, **options)


def resnext(
    name: str, *, conv: str = "gc", groups: int = 32, num_classes: int = 1000, **options: Any
) -> nn.Module:
    """ResNeXt-50 32x4d or -101 32x8d for 224 x 224, the 3x3 convolution of every bottleneck of kind `conv`.

    `gc` with 32 groups is the published ResNeXt, `dgconv` is G-ResNeXt (GroupNet). The 1x1 convolutions
    stay dense. Raises UserError for `sc`: dense 3x3 convolutions are not a ResNeXt.
    """
    if conv == "sc":
        raise UserError(
            f"conv='sc': {name} is made of group convolutions; use gc (32 groups), dgconv or another"
        )
    builders = {"resnext50": models.resnext50_32x4d, "resnext101": models.resnext101_32x8d}
    model = builders[name](num_classes=num_classes)
    if conv == "gc" and groups == 32:
        return model
    return convert(model, conv, groups, skip=lambda _, module: module.groups == 1, **options)
