"""Group convolution of any channels and group sizes, by the C kernels where they can be used."""

import dataclasses
import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.nn.arguments import as_given, as_images, pair
from twolevel.nn.channels import PermuteChannels
from twolevel.nn.inference.grouped import Members, RegroupedConv2d, TakeChannels, block, taking
from twolevel.ops import Geometry
from twolevel.ops.kernels.native import gathered


class GatheredConv2d(nn.Module):
    """A frozen group convolution of any channels: `[B, n, H, W] -> [B, m, H', W']`, in the memory format of the input.

    Group g convolves the n_g channels `inputs[g]` by its block `[m_g, n_g, k, k]`, and channel c of the result is
    channel order[c] of all their outputs in turn.

        take       the groups' inputs side by side       [B, sum n_g, H, W]
        convolve   each group, n_g -> m_g                [B, m, H', W']
        order      outputs to their places

    Three modules, which `fold_permutations` can change; a C kernel computes all of it in one call where it
    can, and then no group is rounded up.
    """

    def __init__(
        self, blocks: list[Tensor], inputs: list[Tensor], order: Tensor, in_channels: int, geometry: Geometry
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, len(order)
        self.take = taking(torch.cat(inputs), in_channels)
        self.convolve = GroupsOfAnySize(blocks, geometry)
        self.order = taking(order, len(order))

    @classmethod
    def of_members(cls, weight: Tensor, geometry: Geometry, members: Members) -> Self:
        """`weight` `[m, n, k, k]` within groups of `members`; every output is in one, inputs may be in several."""
        blocks, inputs = zip(*(block(weight, *channels) for channels in members), strict=True)
        order = torch.cat([outputs for _, outputs in members]).argsort()
        return cls(list(blocks), list(inputs), order, weight.shape[1], geometry).eval()

    @classmethod
    def of_conv(cls, conv: nn.Conv2d, geometry: Geometry) -> Self:
        """The same function as an nn.Conv2d whose padding is zeros and has these numbers."""
        weight = conv.weight.detach()
        every = [
            torch.arange(channels, device=weight.device) for channels in (conv.in_channels, conv.out_channels)
        ]
        form = cls(
            list(weight.chunk(conv.groups)),
            list(every[0].chunk(conv.groups)),
            every[1],
            conv.in_channels,
            geometry,
        )
        if conv.bias is not None:
            form.convolve.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        return form.eval()

    def absorb(self, scale: Tensor, shift: Tensor) -> None:
        """Become scale y + shift for what is y now, `[m]` each."""
        index = _index(self.order)
        rows = slice(None) if index is None else index.argsort()
        self.convolve.absorb(scale[rows], shift[rows])

    def absorb_relu(self) -> None:
        """Become max(0, y) for what is y now."""
        self.convolve.native = dataclasses.replace(self.convolve.native, relu=True)

    def by_torch(self) -> nn.Module:
        """The same function by convolutions of torch, each with a weight of its own."""
        groups, take, order = self.convolve, _index(self.take), _index(self.order)
        every = torch.arange(self.out_channels, device=groups.filters.device)
        take = torch.arange(self.in_channels, device=every.device) if take is None else take
        places = every if order is None else order.argsort()
        blocks, rows = groups.blocks(), [rows for _, rows in groups.native.sizes]
        inputs = take.split([width for width, _ in groups.native.sizes])
        form = RegroupedConv2d(
            [*zip(blocks, inputs, strict=True)],
            [*places.split(rows)],
            self.in_channels,
            groups.native.geometry,
            None if groups.bias is None else groups.bias[every if order is None else order],
        )
        return nn.Sequential(form, nn.ReLU()).eval() if groups.native.relu else form.eval()

    def forward(self, x: Tensor) -> Tensor:
        groups = self.convolve
        filters = groups.filters
        if not gathered.takes(x, filters):
            return self.order(groups(self.take(x)))
        images, indices = as_images(x, self.in_channels), (_index(self.take), _index(self.order))
        return as_given(gathered.convolve_groups(images, groups.native, filters, groups.bias, *indices), x)


def of_members(weight: Tensor, geometry: Geometry, members: Members) -> nn.Module:
    """`weight` `[m, n, k, k]` within groups of `members`: by the C kernels where they can compute it, else by torch."""
    if gathered.takes(weight, weight):
        return GatheredConv2d.of_members(weight, geometry, members)
    return RegroupedConv2d.of_members(weight, geometry, members)


def _index(module: nn.Module) -> Tensor | None:
    """Which channels `taking` takes; None for all in their order."""
    return module.index if isinstance(module, PermuteChannels | TakeChannels) else None


class GroupsOfAnySize(nn.Module):
    """The groups alone, in order: `[B, sum n_g, H, W] -> [B, sum m_g, H', W']`; blocks `[m_g, n_g, k, k]`.

    `filters` are the blocks one after the other, and `bias` `[sum m_g]`, where there is one, is added.
    """

    bias: nn.Parameter | None

    def __init__(self, blocks: list[Tensor], geometry: Geometry):
        super().__init__()
        sizes = tuple((block.shape[1], block.shape[0]) for block in blocks)
        self.native = gathered.GroupsLayer(sizes, pair(blocks[0].shape[2:]), geometry)
        flat = torch.cat([block.flatten() for block in blocks])
        self.filters = nn.Parameter(flat, requires_grad=False)
        self.register_parameter("bias", None)

    def absorb(self, scale: Tensor, shift: Tensor) -> None:
        """Become scale y + shift for what is y now, `[sum m_g]` each."""
        rows = scale.split([rows for _, rows in self.native.sizes])
        blocks = zip(self.filters.split(self._numbers()), rows, strict=True)
        self.filters.copy_(
            torch.cat([(block.view(len(s), -1) * s[:, None]).flatten() for block, s in blocks])
        )
        bias = shift if self.bias is None else self.bias * scale + shift
        self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def blocks(self) -> list[Tensor]:
        """The blocks of the groups, as views."""
        parts = zip(self.filters.split(self._numbers()), self._shapes(), strict=True)
        return [part.view(shape) for part, shape in parts]

    def _shapes(self) -> list[tuple[int, ...]]:
        return [(rows, width, *self.native.kernel) for width, rows in self.native.sizes]

    def _numbers(self) -> list[int]:
        return [math.prod(shape) for shape in self._shapes()]

    def forward(self, x: Tensor) -> Tensor:
        shapes, geometry = self._shapes(), self.native.geometry
        if len(set(shapes)) == 1:
            filters = self.filters.view(-1, *shapes[0][1:])
            y = F.conv2d(x, filters, self.bias, *geometry, len(shapes))
        else:
            parts = zip(x.split([shape[1] for shape in shapes], -3), self.blocks(), strict=True)
            y = torch.cat([F.conv2d(t, w, None, *geometry) for t, w in parts], -3)
            if self.bias is not None:
                y = y + self.bias[:, None, None]
        return y.relu() if self.native.relu else y

    def extra_repr(self) -> str:
        return f"{self.native.sizes}, kernel_size={self.native.kernel}" + (
            ", relu" if self.native.relu else ""
        )
