"""Balanced group convolution (BGC)."""

import torch
from torch import Tensor, nn

from twolevel.nn.arguments import Padding, Size, as_given, as_images
from twolevel.nn.base import ShardedConv2d
from twolevel.ops import balanced_conv2d


class BalancedConv2d(ShardedConv2d):
    """Group convolution whose groups see the mean of all groups.

        x_mean = (x_1 + ... + x_G) / G      channel i is the mean of channel i of every group: n/G of them
        y_g = A_g * x_g + B_g * x_mean      local and mean part, both k x k, n/G -> m/G

    "Balanced Group Convolution: An Improved Group Convolution Based on Approximability Estimates", Lee, Park (arXiv
    2310.12461). No part has a bias. Stride, padding and dilation are those of both parts, which together have 2/G of
    the parameters of a dense convolution.

    Input `[B, n, H, W]`, output `[B, m, H', W']` with n = in_channels, m = out_channels, G = groups.
    Parameters, all rows of group g at dim 0: `local.weight [m, n/G, k, k]`, `mean.weight [m, n/G, k, k]`. Between
    ranks `exchange` adds up x_mean, an all-reduce of n/G channels forward and of their gradient backward
    (`twolevel.ops.balanced` says why).

    Raises UserError where groups does not divide both channel numbers.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            groups=groups,
            dilation=dilation,
            bias=bias,
        )
        shared = {"bias": False, "device": device, "dtype": dtype, **self.geometry._asdict()}
        self.local = nn.Conv2d(in_channels, out_channels, self.kernel_size, groups=groups, **shared)
        self.mean = nn.Conv2d(in_channels // groups, out_channels, self.kernel_size, **shared)

    def forward(self, x: Tensor) -> Tensor:
        images = as_images(x, self.local.in_channels, "BalancedConv2d")
        y = balanced_conv2d(
            images, self.local.weight, self.mean.weight, self.geometry, exchange=self.exchange
        )
        return as_given(y, x)
