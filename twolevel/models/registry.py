"""A network by name."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from twolevel.errors import unknown
from twolevel.models.condensenet import condensenet
from twolevel.models.mobilenetv2 import MobileNetV2
from twolevel.models.resnet import resnet, resnext
from twolevel.models.wide_resnet import wide_resnet, wide_resnet34_2
from twolevel.nn import KINDS, initialize

# wrn-D-k stands for every depth and width; these are the ones that the papers report.
NAMES = ["wrn-10-1", "wrn-16-2", "wrn-16-4", "wrn-28-10", "wrn-28-40", "wrn-28-60", "wrn-28-80"]
NAMES += ["wrn-34-2", "mobilenetv2", "mobilenetv2-cifar", "resnet18", "resnet50", "resnext50", "resnext101"]
NAMES += ["condensenet-50", "condensenet-74", "condensenet-86"]
IMAGENET_NAMES = {
    "wrn-34-2",
    "mobilenetv2",
    "resnet18",
    "resnet50",
    "resnext50",
    "resnext101",
    "condensenet-74",
}


def create(
    name: str,
    *,
    conv: str = "sc",
    groups: int = 1,
    num_classes: int | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """The network `name` with convolutions of kind `conv` and its initial parameters drawn from `seed`.

    For images of 32 x 32 and 10 classes: `wrn-D-k`, but for `wrn-34-2`; `mobilenetv2-cifar`,
    `condensenet-50`, `condensenet-86`. For 224 x 224 and 1000 classes: `wrn-34-2`, `mobilenetv2`, `resnet18`,
    `resnet50`, `resnext50`, `resnext101`, `condensenet-74`. `options` go to every convolution of kind `conv`,
    but for the network's own: `strides` and `width` of `mobilenetv2` and `mobilenetv2-cifar`, `groups_3x3` of
    `condensenet-*`.
    Under `torch.device("meta")` nothing is drawn: call `twolevel.nn.initialize` afterwards.

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
    return 224 if name in IMAGENET_NAMES else 32


def _builder(name: str) -> Callable[..., nn.Module]:
    if name == "wrn-34-2":
        return wide_resnet34_2
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        return partial(wide_resnet, int(match[1]), int(match[2]))
    if name not in NAMES:
        raise unknown("model", name, NAMES)
    if name.startswith("mobilenetv2"):
        return partial(MobileNetV2, cifar=name.endswith("cifar"))
    families = {"resnet": resnet, "resnext": resnext, "condensenet": condensenet}
    return partial(families[name.rstrip("-0123456789")], name)
