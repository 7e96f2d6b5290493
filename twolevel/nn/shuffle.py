"""Group convolution whose output channels are then shuffled."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.nn.arguments import Padding, Size, as_given, as_images, check_groups
from twolevel.nn.base import ReplicatedConv2d, he_normal_
from twolevel.nn.channels import PermuteChannels, take_channels
from twolevel.nn.inference.grouped import frozen_conv2d


class ShuffleConv2d(ReplicatedConv2d):
    """Group convolution, then a fixed shuffle of its output channels, so that the next one mixes groups.

        y_g = A_g * x_g                     group convolution, k x k, n/G -> m/G
        output j G + g = channel j of y_g   torch.channel_shuffle

    ShuffleNet, Zhang et al. (arXiv 1707.01083), Section 3.1. Input `[B, n, H, W]`, output `[B, m, H', W']`
    with G = groups. Parameter, without a bias: `weight [m, n/G, k, k]`, rows in the order of the groups.

    Which shuffle the GC-2L paper (arXiv 2110.05060) compares with is open: it "randomly permutes". With
    `permutation_seed`, output c is channel `permutation[c]` of y instead, the permutation drawn once from
    that seed alone and kept as a buffer.

    Raises UserError where groups does not divide both channel numbers.
    """

    permutation: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        *,
        groups: int,
        dilation: Size = 1,
        bias: bool = False,
        permutation_seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, bias=bias
        )
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        self.groups = groups
        self.permutation_seed = permutation_seed
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        permuted = permutation_seed is not None
        permutation = torch.empty(out_channels, device=device, dtype=torch.int64) if permuted else None
        self.register_buffer("permutation", permutation)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from `generator`, and the permutation, which `to_empty` loses too, from its own seed."""
        he_normal_(self.weight, generator)
        if self.permutation is not None and self.permutation_seed is not None:
            stream = torch.Generator().manual_seed(self.permutation_seed)
            self.permutation.copy_(torch.randperm(self.out_channels, generator=stream, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(as_images(x, self.in_channels), self.weight, None, *self.geometry, self.groups)
        if self.permutation is None:
            return as_given(torch.channel_shuffle(y, self.groups), x)
        return as_given(take_channels(y, self.permutation), x)

    def macs(self, pixels: int, *, nominal: bool = False) -> int:
        return pixels * self.weight.numel()

    def to_inference(self) -> nn.Module:
        """nn.Sequential(nn.Conv2d, PermuteChannels), or nn.Conv2d alone where the shuffle leaves all in place.

        The shuffle cannot be folded into the filters: filters in another order would read the inputs of
        other groups. It remains one copy of the output, a few percent of the convolution's time on a CPU, until
        `twolevel.nn.inference.fold.fold_permutations` moves it into a dense layer that follows.
        """
        conv = frozen_conv2d(self.weight, self.geometry, self.groups)
        order = self.permutation
        if order is None:
            order = torch.arange(self.out_channels, device=self.weight.device)
            order = order.view(self.groups, -1).t().flatten()
        if torch.equal(order, order.sort().values):
            return conv
        return nn.Sequential(conv, PermuteChannels(order.clone())).eval()

    def extra_repr(self) -> str:
        seed = "" if self.permutation is None else f", permutation_seed={self.permutation_seed}"
        return f"{super().extra_repr()}, groups={self.groups}{seed}"
