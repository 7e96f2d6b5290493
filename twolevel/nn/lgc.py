"""Learned group convolution (LGC): each group drops, stage by stage, the inputs that matter least to it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn.arguments import Padding, Size, as_given, as_images, check_divides, check_groups
from twolevel.nn.base import ReplicatedConv2d, he_normal_
from twolevel.nn.inference.gathered import of_members
from twolevel.nn.inference.grouped import frozen_conv2d


class LearnedGroupConv2d(ReplicatedConv2d):
    """Convolution whose G groups of filters each keep n/C of the n inputs in the end.

        y_g = (W_g * kept_g) * x              group g has the outputs g, G + g, 2 G + g, ...
        I_g[j] = sum of |W_g[i, j, u, v]| over its filters i and taps u, v

    "CondenseNet: An Efficient DenseNet using Learned Group Convolutions", Huang et al. (arXiv 1711.09224), section
    3.1. On entering each of C - 1 stages, spread over the first half of training, every group drops the n/C inputs
    of smallest I_g among those that it still keeps; of equal ones that of lower index goes first. What is dropped
    stays so. Progress that passes several stages at once drops what they demand together, whereas the authors' code
    then drops the share of one.

    Input `[B, n, H, W]`, output `[B, m, H', W']`. Parameter: `weight [m, n, k, k]`, without a bias. The buffer `kept`
    is bool `[G, n]`. `condensation` is C, that of `groups` unless given; 1 drops nothing. Neither batch norm nor ReLU
    is part of the layer. Training computes a dense convolution with masked weights; `to_inference` computes the groups
    alone.

    Left open by the paper, and chosen here: weights start as He et al. have it.

    Raises UserError where groups does not divide both channel numbers, or condensation not the input channels.
    """

    kept: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        *,
        groups: int,
        condensation: int | None = None,
        dilation: Size = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, bias=bias
        )
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        self.groups = groups
        self.condensation = groups if condensation is None else condensation
        check_divides("condensation", self.condensation, in_channels=in_channels)
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels, *self.kernel_size, device=device, dtype=dtype)
        )
        self.register_buffer("kept", torch.ones(groups, in_channels, device=device, dtype=torch.bool))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        he_normal_(self.weight, generator)
        self.kept.fill_(True)

    @property
    def stages(self) -> int:
        """How often every group drops inputs: C - 1."""
        return self.condensation - 1

    def stage_at(self, progress: float) -> int:
        """Stages entered at this share of the training, the s-th at s / (2 (C - 1)).

        Raises UserError outside of [0, 1].
        """
        if not 0 <= progress <= 1:
            raise UserError(f"progress={progress} is not a share of the training; use 0 to 1")
        return sum(2 * progress >= stage / self.stages for stage in range(1, self.condensation))

    def set_progress(self, progress: float) -> None:
        """Drop what the stages demand that this share of the training has entered."""
        self.condense(self.stage_at(progress))

    @torch.no_grad()
    def condense(self, stage: int) -> None:
        """Drop inputs of every group until n - stage n/C are left, or fewer as they are; no wait for the device."""
        taps = self.weight.abs().sum((2, 3), dtype=torch.float64)
        importance = taps.unflatten(0, (-1, self.groups)).sum(0)
        # What is dropped already ranks first. Ranks instead of a bound: of equal inputs exactly as many are dropped.
        rank = importance.masked_fill(~self.kept, -1).argsort(dim=-1, stable=True).argsort(dim=-1)
        self.kept.logical_and_(rank >= stage * (self.in_channels // self.condensation))

    def mask(self) -> Tensor:
        """Which input reaches which output, bool `[m, n]`."""
        return self.kept.repeat(self.out_channels // self.groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(as_images(x, self.in_channels), self._masked(), None, *self.geometry)
        return as_given(y, x)

    def group_lasso(self) -> Tensor:
        """The L2 norm of a group's weights of an input, summed over groups and kept inputs: a tensor of no dimension.

        The gradient of a norm that is 0 is 0 here. The authors' code clamps the sum of squares at 1e-6 instead.
        """
        by_group = self._masked().unflatten(0, (-1, self.groups))
        return torch.linalg.vector_norm(by_group, dim=(0, 3, 4)).sum()

    def _masked(self) -> Tensor:
        return self.weight * self.mask()[:, :, None, None]

    def macs(self, pixels: int, *, nominal: bool = False) -> int:
        """Multiply-accumulates of one image: k² m/G a pixel for each input that a group keeps; nominal, n/C of them."""
        return pixels * self.used_parameters(nominal=nominal)

    def used_parameters(self, *, nominal: bool = False) -> int:
        """Weights of kept inputs; nominal, k² m n / C. A layer on the meta device is untrained, and keeps all."""
        if nominal:
            return self.weight.numel() // self.condensation
        inputs = self.kept.numel() if self.kept.is_meta else int(self.kept.sum())
        return inputs * (self.weight[:, 0].numel() // self.groups)

    @torch.no_grad()
    def to_inference(self) -> nn.Module:
        """Each group's kept inputs gathered, the groups alone convolved, outputs put back in order; at any stage.

        A GatheredConv2d where the C kernels can compute it (weights in float32 on the CPU), else a RegroupedConv2d,
        and a dense nn.Conv2d where nothing is dropped. `twolevel.nn.inference.fold.fold_permutations` removes
        their permutations into neighbouring layers.

        Raises UserError on the meta device, where it is not known what is kept.
        """
        if self.kept.is_meta:
            raise UserError("the inputs that a LearnedGroupConv2d keeps are unknown on the meta device")
        weight = self.weight.detach()
        if self.kept.all():
            return frozen_conv2d(weight, self.geometry)
        outputs = torch.arange(self.out_channels, device=weight.device).view(-1, self.groups).t()
        inputs = [kept.nonzero()[:, 0] for kept in self.kept]
        return of_members(weight, self.geometry, [*zip(inputs, outputs, strict=True)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, condensation={self.condensation}"
