"""Frozen group convolutions: of equal groups, and of groups of any channels and sizes."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.nn.arguments import as_given, as_images, pair
from twolevel.nn.channels import PermuteChannels, take_channels
from twolevel.ops import Geometry

LANES = 16
"""float32 channels in one AVX-512 vector; CPU convolutions round narrower groups up to it."""

PADDED_WORK = 1.6
"""Work up to which one padded convolution beat separate ones: by up to 2x at batch 1, hardly at batch 8 (CPU)."""


Block = tuple[Tensor, Tensor]
"""The filters `[m_g, n_g, k, k]` of a group and the input channels `[n_g]` that they read."""

Members = list[tuple[Tensor, Tensor]]
"""The input and the output channels of each group."""


def frozen_conv2d(
    weight: Tensor, geometry: Geometry, groups: int = 1, bias: Tensor | None = None
) -> nn.Conv2d:
    """A convolution in evaluation mode with a copy of `weight` `[m, n/G, k, k]`, and of a `bias` `[m]` where it has
    one, that takes no gradient."""
    out_channels, width, *_ = weight.shape
    # On the meta device there is no initial weight to draw, so the global random stream stays as it was.
    conv = nn.Conv2d(
        width * groups, out_channels, pair(weight.shape[2:]), *geometry, groups, bias=False, device="meta"
    )
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv.eval()


class RegroupedConv2d(nn.Module):
    """A frozen group convolution of any channels: `[B, n, H, W] -> [B, m, H', W']`, by torch alone.

    A group is its block, the filters `[m_g, n_g, k, k]` and the input channels `[n_g]` that they read; `outputs` are
    its output channels `[m_g]`. Every output is in one group; inputs may be in several. `bias` `[m]`, where there is
    one, is added.

    Either one convolution per group or one grouped convolution for all: where the groups are equal, or so
    nearly that zero filters up to the same multiple of LANES channels bring the work to PADDED_WORK times
    that of the groups at most. One call costs less, but computes every group as wide as the widest.
    """

    def __init__(
        self,
        blocks: list[Block],
        outputs: list[Tensor],
        in_channels: int,
        geometry: Geometry,
        bias: Tensor | None = None,
    ):
        super().__init__()
        first = blocks[0][0]
        rows = max(len(filters) for filters, _ in blocks)
        width = max(len(inputs) for _, inputs in blocks)
        if any(filters.shape[:2] != (rows, width) for filters, _ in blocks):
            rows, width = (-(-number // LANES) * LANES for number in (rows, width))
        work = sum(len(filters) * len(inputs) for filters, inputs in blocks)
        together = len(blocks) * rows * width <= PADDED_WORK * work
        if together:
            blocks = [_padded(*block, rows, width) for block in blocks]

        order = torch.empty(sum(map(len, outputs)), dtype=torch.int64, device=first.device)
        start = 0
        for (filters, _), own in zip(blocks, outputs, strict=True):
            order[own] = torch.arange(start, start + len(own), device=first.device)
            start += len(filters)
        if together:
            filters, inputs = (torch.cat(parts) for parts in zip(*blocks, strict=True))
            parts = [(filters, inputs, len(blocks))]
        else:
            parts = [(filters, inputs, 1) for filters, inputs in blocks]
        added = [None] * len(parts)
        if bias is not None:
            of_all = first.new_zeros(start).index_copy(0, order, bias)
            added = of_all.split([len(filters) for filters, _, _ in parts])
        self.parts = nn.ModuleList(
            nn.Sequential(taking(inputs, in_channels), frozen_conv2d(filters, geometry, groups, own))
            for (filters, inputs, groups), own in zip(parts, added, strict=True)
        )
        self.order = taking(order, start)

    @classmethod
    def of_members(cls, weight: Tensor, geometry: Geometry, members: Members) -> Self:
        """`weight` `[m, n, k, k]` within groups of `members`: its entries within groups are used."""
        blocks = [block(weight, *channels) for channels in members]
        form = cls(blocks, [outputs for _, outputs in members], weight.shape[1], geometry)
        if not weight.is_contiguous():
            form.to(memory_format=torch.channels_last)
        return form.eval()

    def forward(self, x: Tensor) -> Tensor:
        parts = [part(x) for part in self.parts]
        return self.order(parts[0] if len(parts) == 1 else torch.cat(parts, -3))


def block(weight: Tensor, inputs: Tensor, outputs: Tensor) -> Block:
    """The block of a group of these channels."""
    if len(inputs) == 0:
        # Outputs that read nothing: a zero filter on channel 0 is cheap, and makes them no special case.
        return weight.new_zeros(len(outputs), 1, *weight.shape[2:]), outputs.new_zeros(1)
    return weight[outputs][:, inputs], inputs


def _padded(filters: Tensor, inputs: Tensor, rows: int, width: int) -> Block:
    """The same group with `rows` outputs and `width` inputs: added filter entries are zero."""
    added = width - len(inputs)
    filters = F.pad(filters, (0, 0, 0, 0, 0, added, 0, rows - len(filters)))
    return filters, torch.cat([inputs, inputs[:1].expand(added)])


class TakeChannels(nn.Module):
    """`[B, n, H, W] -> [B, len(index), H, W]`: output channel c is input channel index[c]."""

    index: Tensor

    def __init__(self, index: Tensor, channels: int):
        super().__init__()
        self.channels = channels
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return as_given(take_channels(as_images(x, self.channels), self.index), x)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.channels}"


def taking(index: Tensor, channels: int) -> nn.Module:
    """The module that takes channels by `index` out of `channels`: as little as that needs."""
    every = torch.arange(channels, device=index.device)
    if torch.equal(index, every):
        return nn.Identity()
    if torch.equal(index.sort().values, every):
        return PermuteChannels(index)
    return TakeChannels(index, channels)
