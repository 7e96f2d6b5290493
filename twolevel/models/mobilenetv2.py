"""MobileNetV2 (Sandler et al., arXiv 1801.04381)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from twolevel.errors import UserError
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


def divisible(channels: float) -> int:
    """The multiple of 8 nearest to `channels`, but at least 8, and no less than nine tenths of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class MobileNetV2(nn.Module):
    """Images `[B, 3, H, W]` to logits `[B, num_classes]`; 224 x 224 and 1000 classes, or with `cifar` 32 x 32 and 10.

    `strides` are those of the first block of each of the seven stages, and `width` multiplies the numbers of channels,
    which are then rounded to multiples of 8; the last 1x1 is not narrowed.

    The expanding and projecting 1x1 convolutions and the last 1x1 are of kind `conv`. With `gc2l` the last one has
    no coarse part, as in the paper of GC-2L; with `dgc` only the projecting ones are of that kind, as in its paper.

    No public model tells how DGC's authors came to 155M operations (CIFAR) and 245M (ImageNet). This is a fit of both:
    four heads, `reduction=8`, the ReLU6 before each of these layers kept, and an operation for each element of
    activations, pooling, selection and biases; on CIFAR xi=0.65 and strides 1 1 2 1 2 1 1; on ImageNet the usual
    strides and xi=0.6, where the text of the paper has 0.75, which makes 228M.

    Raises UserError for other than seven positive strides, a width that is not positive, and channels that groups does
    not divide.
    """

    def __init__(
        self,
        *,
        conv: str = "sc",
        groups: int = 1,
        num_classes: int | None = None,
        cifar: bool = False,
        strides: Sequence[int] | None = None,
        width: float = 1.0,
        **options: Any,
    ):
        super().__init__()
        if strides is None:
            strides = CIFAR_STRIDES if cifar else [stride for *_, stride in STAGES]
        if len(strides) != len(STAGES) or min(strides) < 1:
            raise UserError(
                f"strides={[*strides]} is invalid; use {len(STAGES)} positive numbers, such as {CIFAR_STRIDES}"
            )
        if not 0 < width < math.inf:
            raise UserError(f"width={width} is invalid; use a positive number, such as 0.75")
        project = partial(make_conv, conv, groups=groups, **options)
        expand = partial(make_conv, "sc") if conv == "dgc" else project
        channels, features = divisible(32 * width), divisible(1280 * max(1, width))
        stem = nn.Conv2d(3, channels, 3, stride=1 if cifar else 2, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]
        for (expansion, outputs, blocks, _), first_stride in zip(STAGES, strides, strict=True):
            outputs = divisible(outputs * width)
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(channels, outputs, stride, expansion, expand, project))
                channels = outputs
        last = partial(make_conv, "gc", groups=groups) if conv == "gc2l" else expand
        self.features = nn.Sequential(
            *layers, last(channels, features, 1), nn.BatchNorm2d(features), nn.ReLU6(inplace=True)
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(features, num_classes or (10 if cifar else 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))
