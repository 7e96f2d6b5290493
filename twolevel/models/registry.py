"""A network by name."""

import re
from collections.abc import Callable
from functools import partial

from torch import nn

from twolevel.errors import unknown
from twolevel.models.mobilenetv2 import MobileNetV2
from twolevel.models.wide_resnet import wide_resnet, wide_resnet34_2
from twolevel.nn import KINDS, initialize

# wrn-D-k stands for every depth and width; these are the ones that the papers report.
NAMES = ["wrn-10-1", "wrn-16-2", "wrn-16-4", "wrn-28-10", "wrn-28-40", "wrn-28-60", "wrn-28-80"]
NAMES += ["wrn-34-2", "mobilenetv2"]


def create(
    name: str,
    *,
    conv: str = "sc",
    groups: int = 1,
    num_classes: int | None = None,
    seed: int = 0,
    **options,
) -> nn.Module:
    """The network `name` with convolutions of kind `conv` and its initial parameters drawn from `seed`.

    `wrn-D-k` are wide residual networks for images of 32 x 32 and 10 classes, but for `wrn-34-2`, which
    like `mobilenetv2` is the one for 224 x 224 and 1000 classes. `options` go to every convolution of
    that kind. Under `torch.device("meta")` nothing is drawn: call `twolevel.nn.initialize` afterwards.

    Raises UserError for an unknown name or kind, and for channels that `groups` does not divide.
    """
    if conv not in KINDS:
        raise unknown("conv", conv, KINDS)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    model = _builder(name)(conv=conv, groups=groups, **classes, **options)
    if not any(parameter.is_meta for parameter in model.parameters()):
        initialize(model, seed)
    return model


def image_size(name: str) -> int:
    """Height and width of the images that a network is made for."""
    return 224 if name in ("wrn-34-2", "mobilenetv2") else 32


def _builder(name: str) -> Callable[..., nn.Module]:
    if name == "mobilenetv2":
        return MobileNetV2
    if name == "wrn-34-2":
        return wide_resnet34_2
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return partial(wide_resnet, int(match[1]), int(match[2]))
    raise unknown("model", name, NAMES)
