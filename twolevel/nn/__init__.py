"""Convolutions split by channel group, each a drop-in for torch.nn.Conv2d."""

from twolevel.nn.factory import KINDS, make_conv
from twolevel.nn.init import initialize
from twolevel.nn.layout import Layout, layout_of
from twolevel.nn.two_level import TwoLevelConv2d

__all__ = ["KINDS", "Layout", "TwoLevelConv2d", "initialize", "layout_of", "make_conv"]
