"""Group convolution of any channels and group sizes, by the C kernels where they can be used."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.nn.arguments import as_given, as_images, pair
from twolevel.nn.channels import PermuteChannels
from twolevel.nn.inference.grouped import TakeChannels, block, taking
from twolevel.ops import Geometry
from twolevel.ops.kernels.native import gathered

Members = list[tuple[Tensor, Tensor]]
"""The input and the output channels of each group."""


class GatheredConv2d(nn.Module):
    """A frozen group convolution of any channels: `[B, n, H, W] -> [B, m, H', W']`, in the memory format of the input.

    `weight` `[m, n, k, k]` gives the filters, of which the entries within groups are used; `members` names
    the input and the output channels of each group. Every output is in one group; inputs may be in several.

        take       the groups' inputs side by side       [B, sum n_g, H, W]
        convolve   each group, n_g -> m_g                [B, m, H', W']
        order      outputs to their places

    Three modules, which `fold_permutations` can change; a C kernel computes all of it in one call where it
    can, and then no group is rounded up.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, members: Members):
        super().__init__()
        self.in_channels = weight.shape[1]
        blocks = [block(weight, *channels) for channels in members]
        self.take = taking(torch.cat([inputs for _, inputs in blocks]), self.in_channels)
        self.convolve = GroupsOfAnySize([filters for filters, _ in blocks], geometry)
        outputs = torch.cat([channels for _, channels in members])
        self.order = taking(outputs.argsort(), len(outputs))

    def forward(self, x: Tensor) -> Tensor:
        groups = self.convolve
        filters = groups.filters
        if not gathered.takes(x, filters):
            return self.order(groups(self.take(x)))
        indices = (_index(self.take), _index(self.order))
        problem = (as_images(x, self.in_channels), filters, groups.sizes, *indices)
        return as_given(gathered.convolve_groups(*problem, groups.kernel_size, groups.geometry), x)


def _index(module: nn.Module) -> Tensor | None:
    """Which channels `taking` takes; None for all in their order."""
    return module.index if isinstance(module, PermuteChannels | TakeChannels) else None


class GroupsOfAnySize(nn.Module):
    """The groups alone, in order: `[B, sum n_g, H, W] -> [B, sum m_g, H', W']`; blocks `[m_g, n_g, k, k]`.

    `filters` are the blocks one after the other, and `sizes` (n_g, m_g) of each.
    """

    def __init__(self, blocks: list[Tensor], geometry: Geometry):
        super().__init__()
        self.kernel_size, self.geometry = pair(blocks[0].shape[2:]), geometry
        self.sizes = tuple((block.shape[1], block.shape[0]) for block in blocks)
        flat = torch.cat([block.flatten() for block in blocks])
        self.filters = nn.Parameter(flat, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shapes = [(rows, width, *self.kernel_size) for width, rows in self.sizes]
        if len(set(shapes)) == 1:
            filters = self.filters.view(-1, *shapes[0][1:])
            return F.conv2d(x, filters, None, *self.geometry, len(shapes))
        blocks = self.filters.split([math.prod(shape) for shape in shapes])
        parts = zip(x.split([width for width, _ in self.sizes], -3), blocks, shapes, strict=True)
        return torch.cat([F.conv2d(t, w.view(shape), None, *self.geometry) for t, w, shape in parts], -3)

    def extra_repr(self) -> str:
        return f"{self.sizes}, kernel_size={self.kernel_size}"
