"""The parts of a two-level convolution, and the kinds of kernel that compute them.

Representatives are kept channel-major, z [G, B, H', W']: a rank's part is one contiguous block to gather,
and the coarse term is one matrix product accumulated into y, without a copy, in either memory format.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops import restriction
from twolevel.ops.geometry import Geometry


class Parts(Protocol):
    """One kind of kernel for each part. With P ranks: x `[B, n/P, H, W]`, y and gy `[B, m/P, H', W']`,
    A `[m/P, n/G, k, k]`, r `[G/P, n/G, k, k]`, C `[m/P, G, 1, 1]`, z `[G, B, H', W']`.
    """

    def restrict(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """r * x for this rank's groups: `[G/P, B, H', W']`, contiguous."""

    def restrict_backward(
        self,
        gz: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        gx: Tensor | None,
        want_weight: bool,
    ) -> Tensor | None:
        """Add the gradient of x into `gx` unless that is None; return the weight's if wanted. gz `[G/P, B, H', W']`."""

    def local(self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
        """A * x, in the memory format of x."""

    def local_backward(
        self,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        groups: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and A, None where not wanted."""

    def local_and_restriction(
        self, x: Tensor, local: Tensor, restriction: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor]:
        """`local` and `restrict` in one pass over x."""

    def local_and_restriction_backward(
        self,
        gy: Tensor,
        gz: Tensor,
        x: Tensor,
        local: Tensor,
        restriction: Tensor,
        geometry: Geometry,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of x, A and r, None where not wanted."""

    def add_coarse_(self, y: Tensor, z: Tensor, coarse: Tensor) -> Tensor:
        """y + C z, accumulated into y."""

    def local_and_coarse(
        self, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, z: Tensor, coarse: Tensor
    ) -> Tensor:
        """A * x + C z, where z is there already."""

    def coarse_input_grad(self, gy: Tensor, coarse: Tensor) -> Tensor:
        """C^T gy: `[G, B, H', W']`, contiguous."""

    def coarse_weight_grad(self, gy: Tensor, z: Tensor) -> Tensor:
        """gy z^T summed over images and pixels: `[m/P, G, 1, 1]`."""

    def coarse_grads(self, gy: Tensor, z: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """`coarse_input_grad` and `coarse_weight_grad`, where no rank waits for the first."""


class TorchParts:
    """Parts by operations of torch, on any device and in any memory format; `way` is how it restricts
    (see `twolevel.ops.restriction`).
    """

    def __init__(self, way: restriction.Way):
        self.way = way

    def restrict(self, x, weight, geometry):
        return restriction.restrict(x, weight, geometry, self.way)

    def restrict_backward(self, gz, x, weight, geometry, gx, want_weight):
        return restriction.restrict_backward(gz, x, weight, geometry, gx, want_weight, self.way)

    def local(self, x, weight, geometry, groups):
        return F.conv2d(x, weight, None, *geometry, groups)

    def local_backward(self, gy, x, weight, geometry, groups, wanted):
        return restriction.conv_backward(gy, x, weight, geometry, groups, wanted)

    def local_and_restriction(self, x, local, restriction, geometry):
        groups = len(restriction)
        out = self.local(x, _joined(local, restriction), geometry, groups).unflatten(1, (groups, -1))
        y = out[:, :, :-1].flatten(1, 2).contiguous(memory_format=memory_format_of(x))
        return y, out[:, :, -1].transpose(0, 1).contiguous()

    def local_and_restriction_backward(self, gy, gz, x, local, restriction, geometry, wanted):
        want_x, want_local, want_restriction = wanted
        groups = len(restriction)
        gout = torch.cat([gy.unflatten(1, (groups, -1)), gz.transpose(0, 1)[:, :, None]], 2).flatten(1, 2)
        gout = gout.contiguous(memory_format=memory_format_of(x))
        wanted = (want_x, want_local or want_restriction)
        gx, gw = self.local_backward(gout, x, _joined(local, restriction), geometry, groups, wanted)
        if gw is None:
            return gx, None, None
        rows = gw.unflatten(0, (groups, -1))
        return gx, rows[:, :-1].flatten(0, 1), rows[:, -1]

    def add_coarse_(self, y, z, coarse):
        weight = coarse.flatten(1)
        if y.is_contiguous(memory_format=torch.channels_last):
            pixels = y.permute(0, 2, 3, 1).view(y.numel() // len(weight), len(weight))
            pixels.addmm_(z.flatten(1).t(), weight.t())
        else:
            batch = weight.expand(len(y), -1, -1)
            y.view(len(y), len(weight), y.shape[2] * y.shape[3]).baddbmm_(batch, z.flatten(2).transpose(0, 1))
        return y

    def local_and_coarse(self, x, weight, geometry, groups, z, coarse):
        return self.add_coarse_(self.local(x, weight, geometry, groups), z, coarse)

    def coarse_input_grad(self, gy, coarse):
        batch, _, height, width = gy.shape
        grad = coarse.flatten(1).t() @ gy.transpose(0, 1).flatten(1)
        return grad.view(len(grad), batch, height, width)

    def coarse_weight_grad(self, gy, z):
        # The few rows on the left: on CPUs several times as fast as its transpose.
        return (z.flatten(1) @ gy.transpose(0, 1).flatten(1).t()).t()[..., None, None]

    def coarse_grads(self, gy, z, coarse):
        return self.coarse_input_grad(gy, coarse), self.coarse_weight_grad(gy, z)


def _joined(local: Tensor, restriction: Tensor) -> Tensor:
    """`[m + G, n/G, k, k]`: the restriction is one more output of its group."""
    return torch.cat([local.unflatten(0, (len(restriction), -1)), restriction[:, None]], 1).flatten(0, 1)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last, or contiguous where x is both or neither."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def in_strides_of(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the strides of its tensor, as its users expect: compilers, and buckets of DDP."""
    strides = torch.empty_like(like, device="meta").stride()
    if gradient.stride() == strides:
        return gradient
    return torch.empty_strided(like.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(
        gradient
    )
