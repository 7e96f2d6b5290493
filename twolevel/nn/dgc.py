"""Dynamic group convolution (DGC): every image and head picks the input channels that it uses."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.errors import UserError, unknown
from twolevel.nn.arguments import Padding, Size, as_given, as_images, check_groups
from twolevel.nn.base import ReplicatedConv2d, he_normal_
from twolevel.nn.inference.dgc import DynamicGroupInference
from twolevel.ops.autocast import without_autocast
from twolevel.settings import THRESHOLDS, Threshold

# Channels are dropped from progress 1/12 on, in full from 3/4 on; between, their share rises by 3/2 of the progress.
FIRST_DROP, LAST_DROP, RISE = 1 / 12, 3 / 4, 3 / 2


class Saliency(nn.Module):
    """How much each head wants each channel: g = ReLU(W2 ReLU(W1 p) + beta), one network per head.

    Pooled channels p `[B, n]`, and of all H heads W1 `[H r, n]`, W2 `[H n, r]` and beta `[H, n]`, to
    g `[B, H, n]`. The parameters belong to the layer; this is a module so that a forward hook can read
    g, which the lasso and the global threshold need.
    """

    def forward(self, pooled: Tensor, squeeze: Tensor, excite: Tensor, offset: Tensor) -> Tensor:
        heads, channels = offset.shape
        hidden = F.linear(pooled, squeeze).relu().unflatten(1, (heads, -1))
        return (torch.einsum("bhr,hnr->bhn", hidden, excite.view(heads, channels, -1)) + offset).relu()


class DynamicGroupConv2d(ReplicatedConv2d):
    """BN, ReLU, and H heads, each a convolution of the channels that it finds most salient in this image.

        t   = ReLU(BN(x))                          p = mean of t over its pixels
        g_i = ReLU(W2_i ReLU(W1_i p) + beta_i)     saliency of every channel for head i
        y_i = W_i * (keep_i g_i t)                 keep_i: all but the n_off channels of smallest g_i
        y   = channel j of head i at j H + i       the heads side by side, shuffled

    "Dynamic Group Convolution for Accelerating Convolutional Neural Networks", Su et al. (arXiv
    2007.04242), section 3. The normalisation and the ReLU in front are part of the layer. The mask keep
    takes no gradient; kept channels pass it through g. Of equal saliencies the channel of lower index is
    dropped first, so that n_off channels drop exactly.

    Input `[B, n, H, W]`, output `[B, m, H', W']`. Parameters: `weight [m, n, k, k]`, head by head (head
    i has rows i m/H to (i+1) m/H, the j-th of which gives output channel j H + i); `squeeze` W1
    `[H r, n]`, `excite` W2 `[H n, r]` and `offset` beta `[H, n]`, which starts at 1; those of `norm`.

    `groups` is the number H of heads. `xi` is the share of channels that are dropped in the end.
    `reduction` is d, the hidden width of a saliency network being r = n // d (at least 1); where n is less than
    `halved_below`, d is half of it, as in the authors' code. The paper does not say how W1 and W2 start: as He et
    al., like the weight.

    `progress` (a buffer, so it is in the checkpoint) is how far training is, from 0 to 1; the training
    rule sets it. n_off is 0 to 1/12, round(xi n 3/2 (progress - 1/12)) to 3/4, and round(xi n) from there on: half of
    it at 5/12. It is computed in float64, whatever the layer's type, since many of these products end in 1/2.

    `threshold` "head" drops n_off channels in training and evaluation alike. With "global" (DGC-G) that
    is so in training only: evaluation drops every channel with g <= the buffer `threshold`, the same
    number in all layers of a network, for which the training rule takes a quantile of all saliencies. It
    starts at 0, and dropping what has saliency 0 changes nothing.

    `saliency_bound` multiplies kept channels by min(g, saliency_bound) instead of g. The paper has no bound: g
    grows with t, so an image that is c times as bright as others comes out c² times, c⁴ after the next layer, and
    infinite after a few more. With a bound it is c times. Which channels are kept does not depend on it.

    A forward hook on `saliency` reads g `[B, H, n]`, without the bound.

    Raises UserError where groups does not divide both channel numbers, for a threshold of another name,
    xi outside of [0, 1) or so near 1 that no channel stays, reduction below 1, and a bound that is not positive
    and finite.
    """

    progress: Tensor
    threshold: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Padding = 0,
        *,
        groups: int = 4,
        dilation: Size = 1,
        bias: bool = False,
        xi: float = 0.75,
        reduction: int = 16,
        halved_below: int = 80,
        threshold: Threshold = "head",
        saliency_bound: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, bias=bias
        )
        check_groups(groups, in_channels=in_channels, out_channels=out_channels)
        if threshold not in THRESHOLDS:
            raise unknown("threshold", threshold, THRESHOLDS)
        if not 0 <= xi < 1 or round(xi * in_channels) >= in_channels:
            raise UserError(f"xi={xi} keeps no channel of {in_channels}; use 0 <= xi < 1, such as 0.75")
        if saliency_bound is not None and not 0 < saliency_bound < math.inf:
            raise UserError(
                f"saliency_bound={saliency_bound} is invalid; use a positive number, such as 6, or None"
            )
        if reduction < 1:
            raise UserError(f"reduction={reduction} is not positive; use 1 or more, such as 16")
        self.groups = groups
        self.xi = xi
        self.by_threshold = threshold == "global"
        self.saliency_bound = saliency_bound
        divisor = reduction // 2 if in_channels < halved_below else reduction
        self.hidden = max(1, in_channels // max(1, divisor))

        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(in_channels, **options)
        self.saliency = Saliency()
        self.squeeze = nn.Parameter(torch.empty(groups * self.hidden, in_channels, **options))
        self.excite = nn.Parameter(torch.empty(groups * in_channels, self.hidden, **options))
        self.offset = nn.Parameter(torch.empty(groups, in_channels, **options))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size, **options))
        self.register_buffer("progress", torch.zeros((), device=device, dtype=torch.float64))
        if self.by_threshold:
            self.register_buffer("threshold", torch.zeros((), **options))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for weight in (self.weight, self.squeeze, self.excite):
            he_normal_(weight, generator)
        self.offset.fill_(1)
        self.progress.zero_()
        if self.by_threshold:
            self.threshold.zero_()

    def set_progress(self, progress: float) -> None:
        """Say how far training is. Raises UserError outside of [0, 1]."""
        if not 0 <= progress <= 1:
            raise UserError(f"progress={progress} is not a share of the training; use 0 to 1")
        self.progress.fill_(progress)

    def num_dropped(self) -> Tensor:
        """n_off at the present progress, a tensor of no dimension: nothing waits for its value."""
        progress, most = self.progress.double(), self.xi * self.in_channels
        rising = (most * RISE * (progress - FIRST_DROP)).clamp(min=0)
        return torch.where(progress < LAST_DROP, rising, most).round().long()

    def forward(self, x: Tensor) -> Tensor:
        images = as_images(x, self.in_channels)
        t = self.norm(images).relu()
        g = self._saliency_of(t)
        bounded = g if self.saliency_bound is None else g.clamp(max=self.saliency_bound)
        scale = (bounded * self._mask(g)).to(t.dtype)[..., None, None]
        heads = self.weight.chunk(self.groups)
        # One convolution a head: in training they are faster than a group convolution of H n channels.
        pairs = zip(scale.unbind(1), heads, strict=True)
        y = torch.stack([F.conv2d(t * s, w, None, *self.geometry) for s, w in pairs], 2).flatten(1, 2)
        if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
            y = y.contiguous(memory_format=torch.channels_last)
        return as_given(y, x)

    @torch.no_grad()
    def kept(self, x: Tensor) -> Tensor:
        """Which channels each head keeps of each image in evaluation, bool `[B, H, n]`; changes no state."""
        x, norm = as_images(x, self.in_channels), self.norm
        t = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
        return self._mask(self._saliency_of(t.relu()), training=False)

    def _saliency_of(self, t: Tensor) -> Tensor:
        # Under autocast too in the parameters' type: bfloat16 would tie channels whose order matters.
        with without_autocast(t.device.type):
            pooled = t.mean((2, 3), dtype=self.squeeze.dtype)
            return self.saliency(pooled, self.squeeze, self.excite, self.offset)

    def _mask(self, g: Tensor, training: bool | None = None) -> Tensor:
        g = g.detach()
        if self.by_threshold and not (self.training if training is None else training):
            return g > self.threshold
        # Ranks instead of the n_off-th value: equal saliencies still drop exactly n_off channels.
        rank = g.argsort(dim=-1, stable=True).argsort(dim=-1)
        return rank >= self.num_dropped()

    def macs(self, pixels: int, *, nominal: bool = False) -> int:
        """(n - n_off) k² m pixels + 2 n r H: the heads, and the saliency networks.

        `nominal` takes (1 - xi) n for n - n_off, unrounded. By a global threshold, n_off is the mean aimed at.
        """
        kept = (1 - self.xi) * self.in_channels if nominal else self._kept_now()
        heads = round(kept * self.weight[:, 0].numel() * pixels)
        return heads + self.squeeze.numel() + self.excite.numel()

    def selection_operations(self) -> int:
        """beta is added to, and the mask multiplied with, every head's saliency of every channel."""
        return 2 * self.offset.numel()

    def _kept_now(self) -> int:
        # A layer on the meta device has no progress: it is untrained.
        return self.in_channels - (0 if self.progress.is_meta else int(self.num_dropped()))

    def to_inference(self) -> DynamicGroupInference:
        return DynamicGroupInference(self, self._kept_now()).eval()

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, groups={self.groups}, xi={self.xi}"
        text += "" if self.saliency_bound is None else f", saliency_bound={self.saliency_bound}"
        return text + (", threshold='global'" if self.by_threshold else "")
