"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from twolevel.errors import UserError
from twolevel.nn import make_conv
from twolevel.nn.batch_norm import batch_norm_relu, batch_norm_relu_and_input


class Block(nn.Module):
    """Pre-activation block: o = ReLU(BN(x)), then 3x3 (stride), BN, ReLU, 3x3, added to the shortcut.

    The shortcut is x, or a 1x1 convolution of o where the shape changes. `[B, n, H, W]` to
    `[B, m, H/stride, W/stride]`, rounded up.
    """

    only_added = ("conv2", "shortcut")
    """Layers whose outputs no gradient needs: they are not computed again (`twolevel.nn.recompute_blocks`)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv: Callable[..., nn.Module]):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride, 1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, 1, 1)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        o, x = batch_norm_relu_and_input(self.bn1, x)
        out = self.conv2(batch_norm_relu(self.bn2, self.conv1(o)))
        return out + (x if self.shortcut is None else self.shortcut(o))


class WideResNet(nn.Module):
    """Stem, stages of `Block` that halve the image from the second stage on, BN, ReLU, pooling, classifier.

    `[B, 3, H, W]` to logits `[B, num_classes]`.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: list[int],
        widths: list[int],
        conv: Callable[..., nn.Module],
        num_classes: int,
    ):
        super().__init__()
        self.stem = stem
        channels = next(m.out_channels for m in stem.modules() if isinstance(m, nn.Conv2d))
        stages: list[nn.Module] = []
        for index, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            strides = [1 if index == 0 else 2] + [1] * (depth - 1)
            inputs = [channels] + [width] * (depth - 1)
            stages.append(
                nn.Sequential(*(Block(n, width, s, conv) for n, s in zip(inputs, strides, strict=True)))
            )
            channels = width
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = batch_norm_relu(self.bn, self.stages(self.stem(x)))
        return self.classifier(x.mean((2, 3)))


def wide_resnet(
    depth: int, widen: int, *, conv: str = "sc", groups: int = 1, num_classes: int = 10, **options: Any
) -> WideResNet:
    """WRN-depth-widen for images of 32 x 32, its weights not yet drawn by `initialize`.

    Every 3x3 convolution and 1x1 shortcut of the blocks is of kind `conv` with `groups` groups; `options`
    go to each of them. Raises UserError unless depth is 6 n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"depth={depth} is not 6 n + 4; use one of 10, 16, 22, 28, 34, 40, ...")
    if widen < 1:
        raise UserError(f"widen={widen} is not positive; use 1 or more")
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    widths = [16 * widen, 32 * widen, 64 * widen]
    make = partial(make_conv, conv, groups=groups, **options)
    return WideResNet(stem, [(depth - 4) // 6] * 3, widths, make, num_classes)


def wide_resnet34_2(
    *, conv: str = "sc", groups: int = 1, num_classes: int = 1000, **options: Any
) -> WideResNet:
    """WRN-34-2 for images of 224 x 224: stem 7x7 of stride 2 and max-pooling, stages of 3, 4, 6, 3 blocks."""
    stem = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, stride=2, padding=1)
    )
    make = partial(make_conv, conv, groups=groups, **options)
    return WideResNet(stem, [3, 4, 6, 3], [128, 256, 512, 1024], make, num_classes)
