"""Convolutions split by channel group, each a drop-in for torch.nn.Conv2d."""

from twolevel.nn.balanced import BalancedConv2d
from twolevel.nn.convert import Conversion, convert
from twolevel.nn.dgc import DynamicGroupConv2d
from twolevel.nn.dgconv import DGConv2d
from twolevel.nn.factory import KINDS, make_conv
from twolevel.nn.flgc import FLGConv2d
from twolevel.nn.inference.network import for_inference
from twolevel.nn.init import initialize
from twolevel.nn.layout import Layout, layout_of
from twolevel.nn.lgc import LearnedGroupConv2d
from twolevel.nn.recompute import recompute_blocks
from twolevel.nn.shuffle import ShuffleConv2d
from twolevel.nn.transfer import Transfer, transfer
from twolevel.nn.two_level import TwoLevelConv2d

__all__ = [
    "KINDS",
    "BalancedConv2d",
    "Conversion",
    "DGConv2d",
    "DynamicGroupConv2d",
    "FLGConv2d",
    "Layout",
    "LearnedGroupConv2d",
    "ShuffleConv2d",
    "Transfer",
    "TwoLevelConv2d",
    "convert",
    "for_inference",
    "initialize",
    "layout_of",
    "make_conv",
    "recompute_blocks",
    "transfer",
]
