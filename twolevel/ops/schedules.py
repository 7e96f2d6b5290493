"""The overlapped schedule of the two-level convolution: the exchange runs under the local convolution.

              rank p                                        the link
    forward   z_p = r_p * x_p
              start gather  ------------------------------>  z = [z_1 ... z_G]
              y_p = A_p * x_p                                    |
              wait  <--------------------------------------------+
              y_p += C_p z

    backward  gz = C_p^T gy_p
              start scatter ------------------------------>  gz_p = sum over ranks of gz[p]
              gC_p, gA_p, gx_p from gy_p                         |
              wait  <--------------------------------------------+
              gr_p, gx_p += from gz_p

Representatives are kept channel-major, z [G, B, H', W']: a rank's part is one contiguous block to gather,
and the coarse term is one matrix product accumulated into y, without a copy, in either memory format.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops.geometry import Geometry
from twolevel.ops.restriction import conv_backward, restrict, restrict_backward


class Pending(Protocol):
    """A collective in flight."""

    def wait(self) -> Tensor:
        """Block (or make the current stream wait) until the result is there, and return it."""


class Exchange(Protocol):
    """How representatives cross ranks: P ranks, each holding G/P consecutive groups."""

    ranks: int

    def gather(self, own: Tensor) -> Pending:
        """Start `[G/P, B, H, W] -> [G, B, H, W]`, the parts of all ranks in order of rank."""

    def scatter_sum(self, parts: Tensor) -> Pending:
        """Start `[G, B, H, W] -> [G/P, B, H, W]`, this rank's part of the sum over ranks."""


class _Local:
    """The exchange of one rank that holds every group: nothing crosses."""

    ranks = 1

    class _Done(NamedTuple):
        value: Tensor

        def wait(self) -> Tensor:
            return self.value

    def gather(self, own: Tensor) -> Pending:
        return self._Done(own)

    scatter_sum = gather


LOCAL = _Local()


def channel_major(z: Tensor) -> Tensor:
    """`[B, G, H, W] -> [G, B, H, W]` contiguous; a view where G is 1."""
    return z.transpose(0, 1).contiguous()


def add_coarse_(y: Tensor, z: Tensor, coarse: Tensor) -> Tensor:
    """y + C z, accumulated into y [B, m, H, W] from z [G, B, H, W] and C [m, G, 1, 1]."""
    weight = coarse.flatten(1)
    if y.is_contiguous(memory_format=torch.channels_last):
        pixels = y.permute(0, 2, 3, 1).view(y.numel() // len(weight), len(weight))
        pixels.addmm_(z.flatten(1).t(), weight.t())
    else:
        batch = weight.expand(len(y), -1, -1)
        y.view(len(y), len(weight), y.shape[2] * y.shape[3]).baddbmm_(batch, z.flatten(2).transpose(0, 1))
    return y


def coarse_input_grad(gy: Tensor, coarse: Tensor) -> Tensor:
    """C^T gy: gy [B, m, H, W] -> [G, B, H, W] contiguous."""
    batch, _, height, width = gy.shape
    grad = coarse.flatten(1).t() @ gy.transpose(0, 1).flatten(1)
    return grad.view(len(grad), batch, height, width)


def coarse_weight_grad(gy: Tensor, z: Tensor) -> Tensor:
    """gy z^T summed over images and pixels: [m, G, 1, 1]."""
    # The few rows on the left: on CPUs several times as fast as its transpose.
    return (z.flatten(1) @ gy.transpose(0, 1).flatten(1).t()).t()[..., None, None]


class _Overlapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, local, restriction, coarse, geometry, exchange):
        gathering = exchange.gather(restrict(x, restriction, geometry))
        y = F.conv2d(x, local, None, *geometry, len(restriction))
        z = gathering.wait()
        ctx.save_for_backward(x, local, restriction, coarse, z)
        ctx.geometry, ctx.exchange = geometry, exchange
        return add_coarse_(y, z, coarse)

    @staticmethod
    def backward(ctx, gy):
        x, local, restriction, coarse, z = ctx.saved_tensors
        need_x, need_local, need_restriction, need_coarse = ctx.needs_input_grad[:4]
        geometry, groups = ctx.geometry, len(restriction)

        # Every rank takes part, whatever it needs itself: its C feeds the other ranks' restrictions.
        scattering = ctx.exchange.scatter_sum(coarse_input_grad(gy, coarse))
        g_coarse = coarse_weight_grad(gy, z) if need_coarse else None
        gx, g_local = conv_backward(gy, x, local, geometry, groups, (need_x, need_local))
        gz = scattering.wait()
        g_restriction = restrict_backward(gz, x, restriction, geometry, gx, need_restriction)
        return gx, g_local, g_restriction, g_coarse, None, None


def overlapped(
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    geometry: Geometry,
    exchange: Exchange = LOCAL,
) -> Tensor:
    """y_g = A_g * x_g + C_g [r_1 * x_1 ... r_G * x_G] for the groups this rank holds.

    With P ranks: x [B, n/P, H, W], local [m/P, n/G, k, k], restriction [G/P, n/G, k, k],
    coarse [m/P, G, 1, 1] -> y [B, m/P, H', W'].
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and x.dtype != torch.float64:
        # Cast outside the autograd function, so that gradients come back in the parameters' type.
        dtype = torch.get_autocast_dtype(device)
        x, local, restriction, coarse = (t.to(dtype) for t in (x, local, restriction, coarse))
    return _Overlapped.apply(x, local, restriction, coarse, geometry, exchange)
