"""Fully learnable group convolution (FLGC): each channel learns the group that it belongs to."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.errors import UserError
from twolevel.nn.arguments import Padding, Size, as_given, as_images
from twolevel.nn.base import ReplicatedConv2d, he_normal_, set_blocks_
from twolevel.nn.inference.gathered import of_members


def one_hot_rows(logits: Tensor) -> Tensor:
    """The one-hot argmax of each row of softmax(logits), ties to one column: `[c, G] -> [c, G]`.

    Backward is straight-through at the binarisation, then the Jacobian of the softmax: with p = softmax(s)
    and dL/dB the gradient that reaches the result, dL/ds = p (dL/dB - sum_g p_g dL/dB_g).
    """
    soft = logits.softmax(1)
    hard = torch.zeros_like(soft).scatter(1, soft.argmax(1, keepdim=True), 1)
    # In this order it is exactly 0 or 1: the difference is 0, whereas (hard + soft) - soft is rounded.
    return hard + (soft - soft.detach())


class FLGConv2d(ReplicatedConv2d):
    """Group convolution whose groups are learned, one choice for each input and each output channel.

        W' = W * (T S^T),  y = W' conv x      S [n, G] and T [m, G] with one-hot rows

    "Fully Learnable Group Convolution for Acceleration of Deep Neural Networks", Wang et al. (arXiv
    1904.00346). A row of S or T is the argmax of the softmax of its logits; `one_hot_rows` says how
    gradients pass it. Input `[B, n, H, W]`, output `[B, m, H', W']`. Parameters, without a bias:
    `weight [m, n, k, k]`, `input_logits [n, G]` (of S), `output_logits [m, G]` (of T).

    Any G >= 1 is valid. Groups are unequal and may be empty: outputs of a group without inputs are zero, inputs
    of a group without outputs are unused. Training computes a dense convolution with masked weights;
    `to_inference` computes the groups alone.

    Left open by the paper, and chosen here: logits start normal with `logit_std`, so that groups are random
    and about balanced; weights start with the variance of a balanced group convolution, 2 / (k^2 n/G);
    logits are spared weight decay (`undecayed`) unless `decay_logits`.

    Raises UserError where groups is not positive or logit_std is negative.
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
        logit_std: float = 0.1,
        decay_logits: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, bias=bias
        )
        if groups < 1:
            raise UserError(f"groups={groups} is not positive; use 1 or more")
        if not logit_std >= 0:
            raise UserError(f"logit_std={logit_std} is negative; use 0 or more, such as 0.1")
        self.groups = groups
        self.logit_std = logit_std
        self.undecayed = () if decay_logits else ("input_logits", "output_logits")
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size, **options))
        self.input_logits = nn.Parameter(torch.empty(in_channels, groups, **options))
        self.output_logits = nn.Parameter(torch.empty(out_channels, groups, **options))
        self.reset_parameters()

    @classmethod
    @torch.no_grad()
    def from_grouped(
        cls, conv: nn.Conv2d, *, logit: float = 1.0, generator: torch.Generator | None = None, **options: Any
    ) -> Self:
        """The same function as an nn.Conv2d with groups, exactly.

        Each channel has the logit `logit` for its own group and 0 for the others. The weights between groups,
        which the mask hides, are drawn from `generator`: zeros would tell the logits nothing about other groups.
        `options` go to the class.

        Raises UserError for a bias, a padding other than zeros, or a logit that is not positive.
        """
        if conv.bias is not None or conv.padding_mode != "zeros":
            what = "a bias" if conv.bias is not None else f"padding_mode={conv.padding_mode!r}"
            raise UserError(
                f"the convolution has {what}, which FLGConv2d does not support; use bias=False, zero padding"
            )
        if not logit > 0:
            raise UserError(f"logit={logit} does not choose a group; use one above 0, such as 1")
        layer = cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
            groups=conv.groups,
            dilation=conv.dilation,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        layer.reset_parameters(generator)
        groups = torch.eye(conv.groups, device=conv.weight.device, dtype=conv.weight.dtype)
        for logits in (layer.input_logits, layer.output_logits):
            logits.copy_(logit * groups.repeat_interleave(len(logits) // conv.groups, 0))
        set_blocks_(layer.weight, conv)
        return layer.train(conv.training)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        he_normal_(self.weight, generator).mul_(self.groups**0.5)
        for logits in (self.input_logits, self.output_logits):
            if not logits.is_meta:
                draws = torch.randn(logits.shape, generator=generator, dtype=torch.float32, device="cpu")
                logits.copy_(draws * self.logit_std)

    def mask(self) -> Tensor:
        """T S^T `[m, n]`: 1 where output and input are in the same group, else 0."""
        return one_hot_rows(self.output_logits) @ one_hot_rows(self.input_logits).t()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.mask()[:, :, None, None]
        return as_given(F.conv2d(as_images(x, self.in_channels), weight, None, *self.geometry), x)

    @torch.no_grad()
    def groups_of(self) -> tuple[Tensor, Tensor]:
        """The group of each input channel `[n]` and of each output channel `[m]`.

        Raises UserError on the meta device, where logits have no values.
        """
        if self.weight.is_meta:
            raise UserError("the groups of an FLGConv2d on the meta device are unknown; count nominal=True")
        return self.input_logits.softmax(1).argmax(1), self.output_logits.softmax(1).argmax(1)

    def macs(self, pixels: int, *, nominal: bool = False) -> int:
        """Multiply-accumulates of one image: sum_g k^2 n_g m_g a pixel; nominal, k^2 n m / G, rounded down.

        Zeros with which RegroupedConv2d may fill up groups are not counted.
        """
        if nominal:
            return pixels * self.weight.numel() // self.groups
        inputs, outputs = (group.bincount(minlength=self.groups) for group in self.groups_of())
        kernel = self.kernel_size[0] * self.kernel_size[1]
        return pixels * kernel * int(inputs @ outputs)

    def used_parameters(self, *, nominal: bool = False) -> int:
        """Weights within groups: sum_g k^2 n_g m_g; nominal, k^2 n m / G. S and T are not counted."""
        return self.macs(1, nominal=nominal)

    @torch.no_grad()
    def to_inference(self) -> nn.Module:
        """Inputs gathered by group, the groups alone convolved, outputs put back in order.

        A GatheredConv2d where the C kernels can compute it (weights in float32 on the CPU), else a RegroupedConv2d.
        `twolevel.nn.inference.fold.fold_permutations` removes their permutations into neighbouring layers.
        """
        inputs, outputs = self.groups_of()
        members = [((inputs == g).nonzero()[:, 0], (outputs == g).nonzero()[:, 0]) for g in outputs.unique()]
        return of_members(self.weight.detach(), self.geometry, members)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
