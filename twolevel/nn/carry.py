"""Copy a convolution's weights to another kind of convolution that can represent the same function."""

import torch
from torch import nn

from twolevel.nn.arguments import geometry, pair
from twolevel.nn.balanced import BalancedConv2d
from twolevel.nn.base import set_blocks_
from twolevel.nn.dgconv import DGConv2d
from twolevel.nn.flgc import FLGConv2d
from twolevel.nn.lgc import LearnedGroupConv2d
from twolevel.nn.two_level import TwoLevelConv2d

DRAWN = "weights drawn anew"


@torch.no_grad()
def carry_weights(old: nn.Conv2d, new: nn.Module) -> str:
    """Make `new` compute the function of `old` if it can; the result says what became of the weights.

    | old, with g groups | new                       | how                                              |
    |--------------------|---------------------------|--------------------------------------------------|
    | g                  | group convolution, g      | the same weight                                  |
    | g                  | GC-2L, g                  | local = weight, C = 0                            |
    | g                  | BGC, g                    | local = weight, B = 0                            |
    | any                | DGConv, g a power of two  | the dense weight, gates open within the groups   |
    | any                | FLGC, g                   | the dense weight, logits of contiguous groups    |
    | any                | LGC, any                  | the dense weight, no input dropped               |
    """
    if old.weight.is_meta:
        return DRAWN
    if isinstance(new, TwoLevelConv2d) and new.groups == old.groups:
        new.local.weight.copy_(old.weight)
        new.coarse.weight.zero_()
        return "weights kept, C = 0"
    if isinstance(new, BalancedConv2d) and new.groups == old.groups:
        new.local.weight.copy_(old.weight)
        new.mean.weight.zero_()
        return "weights kept, B = 0"
    if type(new) is nn.Conv2d and new.groups == old.groups:
        new.weight.copy_(old.weight)
        return "weights kept"
    if isinstance(new, LearnedGroupConv2d):
        set_blocks_(new.weight.zero_(), old)
        return "weights kept, dense"
    doubling = old.groups & (old.groups - 1) == 0 and old.groups <= 2 ** len(getattr(new, "gates", ()))
    if (isinstance(new, DGConv2d) and doubling) or (isinstance(new, FLGConv2d) and new.groups == old.groups):
        new.load_state_dict(type(new).from_grouped(_without_bias(old)).state_dict())
        return "weights kept" + (f", {old.groups} contiguous groups" if old.groups > 1 else ", dense")
    return DRAWN


def _without_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution, its weight shared, without the bias, which `convert` keeps apart."""
    kernel_size = pair(conv.kernel_size)
    how = geometry(kernel_size, conv.stride, conv.padding, conv.dilation)
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel_size, *how, conv.groups, bias=False, device="meta"
    )
    plain.weight = conv.weight
    return plain
