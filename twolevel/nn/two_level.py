"""Two-level group convolution (GC-2L)."""

import torch
from torch import Tensor, nn

from twolevel.errors import UserError, unknown
from twolevel.nn.arguments import Padding, Size, as_images
from twolevel.nn.base import ShardedConv2d
from twolevel.ops import two_level_conv2d
from twolevel.ops.autocast import cast_for_convolution
from twolevel.ops.problem import Problem
from twolevel.settings import KERNELS, SCHEDULES, Kernels, Schedule


class TwoLevelConv2d(ShardedConv2d):
    """Group convolution whose groups see R representative channels of every group.

        z_g = r_g * x_g                      restriction   k x k, n/G -> R
        y_g = A_g * x_g + C_g [z_1 ... z_G]  local k x k, n/G -> m/G, plus coarse 1 x 1, R G -> m/G

    "Two-level Group Convolution", Lee, Park, Lee (arXiv 2110.05060), where R = `representatives` is 1: more of them
    take more work and exchange, and come nearer to a dense convolution. No part has a bias. Stride, padding and
    dilation belong to the local and restriction convolutions.

    Input `[B, n, H, W]`, output `[B, m, H', W']` with n = in_channels, m = out_channels, G = groups.
    Parameters, all rows of group g at dim 0: `local.weight [m, n/G, k, k]`,
    `restriction.weight [R G, n/G, k, k]`, `coarse.weight [m, R G, 1, 1]`. Between ranks `exchange` carries the
    representatives.

    `schedule` and `kernels` say how it is computed (see `twolevel.ops.two_level_conv2d`).

    Raises UserError where groups does not divide both channel numbers, for fewer than one representative, and for
    unknown schedule or kernels.
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
        representatives: int = 1,
        dilation: Size = 1,
        bias: bool = False,
        schedule: Schedule = "auto",
        kernels: Kernels = "auto",
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
        if not isinstance(representatives, int) or representatives < 1:
            raise UserError(
                f"representatives={representatives} is invalid; use 1, as the paper has it, or more"
            )
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        if kernels not in KERNELS:
            raise unknown("kernels", kernels, KERNELS)
        self.representatives = representatives
        self.schedule: str = schedule
        self.kernels: str = kernels
        options = {"bias": False, "device": device, "dtype": dtype}
        shared = {**options, **self.geometry._asdict(), "groups": groups}
        self.local = nn.Conv2d(in_channels, out_channels, self.kernel_size, **shared)
        self.restriction = nn.Conv2d(in_channels, representatives * groups, self.kernel_size, **shared)
        self.coarse = nn.Conv2d(representatives * groups, out_channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        images = as_images(x, self.local.in_channels, "TwoLevelConv2d")
        y = two_level_conv2d(
            images,
            self.local.weight,
            self.restriction.weight,
            self.coarse.weight,
            self.geometry,
            schedule=self.schedule,
            kernels=self.kernels,
            exchange=self.exchange,
        )
        return y if images is x else y[0]

    def problem(self, x: Tensor) -> Problem:
        """The sizes and tensors of this layer for x, from which `twolevel.ops.dispatch` chooses kernels."""
        weights = (self.local.weight, self.restriction.weight, self.coarse.weight)
        x, local, restriction, coarse = cast_for_convolution(x, *weights)
        return Problem.of(x, local, restriction, coarse, self.geometry, self.exchange.ranks)

    def extra_repr(self) -> str:
        text = f", representatives={self.representatives}" if self.representatives > 1 else ""
        return f"{super().extra_repr()}{text}, schedule={self.schedule!r}, kernels={self.kernels!r}"
