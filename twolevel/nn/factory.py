"""A convolution by name."""

from collections.abc import Callable
from typing import Any

from torch import nn

from twolevel.errors import UserError, unknown
from twolevel.nn.arguments import Padding, Size, check_groups, check_no_bias
from twolevel.nn.balanced import BalancedConv2d
from twolevel.nn.dgc import DynamicGroupConv2d
from twolevel.nn.dgconv import DGConv2d
from twolevel.nn.flgc import FLGConv2d
from twolevel.nn.lgc import LearnedGroupConv2d
from twolevel.nn.shuffle import ShuffleConv2d
from twolevel.nn.two_level import TwoLevelConv2d


def _dense(*args: Any, groups: int, **options: Any) -> nn.Module:
    if groups != 1:
        raise UserError(f"conv='sc' is dense and takes groups=1, not groups={groups}; use gc, gc2l or bgc")
    return nn.Conv2d(*args, bias=False, **options)


def _grouped(in_channels: int, out_channels: int, *args: Any, groups: int, **options: Any) -> nn.Module:
    check_groups(groups, in_channels=in_channels, out_channels=out_channels)
    return nn.Conv2d(in_channels, out_channels, *args, groups=groups, bias=False, **options)


def _learned_groups(*args: Any, groups: int, **options: Any) -> nn.Module:
    """groups=1 leaves to `initial` where the gates start; more groups are those to start with."""
    return DGConv2d(*args, groups=None if groups == 1 else groups, **options)


KINDS: dict[str, Callable[..., nn.Module]] = {
    "sc": _dense,
    "gc": _grouped,
    "gc2l": TwoLevelConv2d,
    "bgc": BalancedConv2d,
    "shuffle": ShuffleConv2d,
    "flgc": FLGConv2d,
    "dgconv": _learned_groups,
    "dgc": DynamicGroupConv2d,
    "lgc": LearnedGroupConv2d,
}


def make_conv(
    kind: str,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding: Padding = 0,
    *,
    groups: int = 1,
    bias: bool = False,
    **options: Any,
) -> nn.Module:
    """A convolution without bias, `[B, n, H, W] -> [B, m, H', W']`, of the given kind.

    `sc` standard (dense), `gc` group convolution, `gc2l` two-level group convolution, `bgc` balanced group
    convolution, `shuffle` group convolution and channel shuffle, `flgc` fully learnable group convolution,
    `dgconv` dynamic grouping convolution (GroupNet; its groups are learned, `groups` is where they start),
    `dgc` dynamic group convolution with `groups` heads, which brings a batch norm and a ReLU of its own,
    `lgc` learned group convolution (CondenseNet), whose groups each keep 1/`condensation` of the inputs in the end.
    `options` go to the class of that kind.

    Raises UserError for an unknown kind, groups other than 1 with `sc`, groups that do not divide both channel numbers,
    and for a bias.
    """
    check_no_bias(bias)
    if kind not in KINDS:
        raise unknown("conv", kind, KINDS)
    build = KINDS[kind]
    return build(in_channels, out_channels, kernel_size, stride, padding, groups=groups, **options)
