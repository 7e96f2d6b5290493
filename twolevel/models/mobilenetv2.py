"""MobileNetV2 (Sandler et al., arXiv 1801.04381)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from twolevel.nn import make_conv

# Expansion, output channels, blocks, stride of the first: table 2 of the paper.
STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


# On images of 32 x 32 the stem and the stage of 24 channels keep the size.
CIFAR_STRIDES = [1, 1, 2, 2, 1, 2, 1]


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3 (stride), project 1x1; added to the input where the shape is the same."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        expand: Callable[..., nn.Module],
        project: Callable[..., nn.Module],
    ):
        super().__init__()
        hidden = in_channels * expansion
        expanding = [expand(in_channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.layers = nn.Sequential(
            *(expanding if expansion != 1 else []),
            *(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(project(hidden, out_channels, 1), nn.BatchNorm2d(out_channels)),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """Images `[B, 3, H, W]` to logits `[B, num_classes]`; 224 x 224 and 1000 classes, or with `cifar` 32 x 32 and 10.

    The expanding and projecting 1x1 convolutions and the last 1x1 are of kind `conv`. With `gc2l` the last one has
    no coarse part, as in the paper of GC-2L; with `dgc` only the projecting ones are of that kind, as in its paper.
    """

    def __init__(
        self,
        *,
        conv: str = "sc",
        groups: int = 1,
        num_classes: int | None = None,
        cifar: bool = False,
        **options: Any,
    ):
        super().__init__()
        project = partial(make_conv, conv, groups=groups, **options)
        expand = partial(make_conv, "sc") if conv == "dgc" else project
        stem = nn.Conv2d(3, 32, 3, stride=1 if cifar else 2, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
        channels = 32
        strides = CIFAR_STRIDES if cifar else [stride for *_, stride in STAGES]
        for (expansion, width, blocks, _), first_stride in zip(STAGES, strides, strict=True):
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(channels, width, stride, expansion, expand, project))
                channels = width
        last = partial(make_conv, "gc", groups=groups) if conv == "gc2l" else expand
        self.features = nn.Sequential(
            *layers, last(channels, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6(inplace=True)
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, num_classes or (10 if cifar else 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))
