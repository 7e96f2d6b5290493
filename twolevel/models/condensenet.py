"""CondenseNet (Huang et al., arXiv 1711.09224), its 1x1 convolutions of any kind."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twolevel.nn import DynamicGroupConv2d, make_conv
from twolevel.nn.arguments import check_divides

# Layers of each stage; growth of each stage.
CIFAR = {"condensenet-50": [8, 8, 8], "condensenet-86": [14, 14, 14]}, [8, 16, 32]
IMAGENET = {"condensenet-74": [4, 6, 8, 10, 8]}, [8, 16, 32, 64, 128]
BOTTLENECK = 4  # channels between the two convolutions of a layer, in units of its growth
GROUPS_3X3 = 4


class DenseLayer(nn.Module):
    """1x1 to 4 growth, then BN, ReLU, 3x3 group convolution to growth; appended to the input's channels.

    BN and ReLU stand before the 1x1 too, unless it brings its own (DGC). `[B, n, H, W]` to `[B, n + growth, H, W]`.
    """

    def __init__(self, channels: int, growth: int, conv: Callable[..., nn.Module], groups_3x3: int):
        super().__init__()
        width = BOTTLENECK * growth
        first = conv(channels, width, 1)
        before = (
            [] if isinstance(first, DynamicGroupConv2d) else [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        )
        second = nn.Conv2d(width, growth, 3, padding=1, groups=groups_3x3, bias=False)
        self.layers = nn.Sequential(*before, first, nn.BatchNorm2d(width), nn.ReLU(inplace=True), second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class CondenseNet(nn.Module):
    """Stages of dense layers with average pooling between them; images `[B, 3, H, W]` to `[B, num_classes]`."""

    def __init__(
        self,
        stages: list[int],
        growth: list[int],
        stem_stride: int,
        conv: Callable[..., nn.Module],
        num_classes: int,
        groups_3x3: int = GROUPS_3X3,
    ):
        super().__init__()
        channels = 2 * growth[0]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False)]
        for index, (depth, step) in enumerate(zip(stages, growth, strict=True)):
            if index:
                layers.append(nn.AvgPool2d(2))
            for _ in range(depth):
                layers.append(DenseLayer(channels, step, conv, groups_3x3))
                channels += step
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def condensenet(
    name: str,
    *,
    conv: str = "dgc",
    groups: int = 4,
    num_classes: int | None = None,
    groups_3x3: int = GROUPS_3X3,
    **options: Any,
) -> CondenseNet:
    """`condensenet-50` and `-86` for 32 x 32 and 10 classes, `condensenet-74` for 224 x 224 and 1000.

    The paper of DGC compares condensenet-50 with learned group convolution (LGC) at 66M operations. That is LGC of
    condensation 1, which learns no groups: the dense 1x1 convolutions of `conv="sc"`.

    `groups_3x3` are the groups of the 3x3 convolutions, in the paper of CondenseNet as many as those of LGC.

    Raises UserError for channels that groups does not divide, and growth that groups_3x3 does not divide.
    """
    sizes, growth = IMAGENET if name in IMAGENET[0] else CIFAR
    check_divides("groups_3x3", groups_3x3, growth=math.gcd(*growth))
    stride, classes = (2, 1000) if name in IMAGENET[0] else (1, 10)
    make = partial(make_conv, conv, groups=groups, **options)
    return CondenseNet(sizes[name], growth, stride, make, num_classes or classes, groups_3x3)
