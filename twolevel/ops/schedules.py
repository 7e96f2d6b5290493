"""When the operations of a two-level convolution run, and when its exchange.

`overlapped`: the exchange runs under the local convolution.

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

`fused`, the paper's: one convolution with m/G + 1 outputs a group computes y_p and z_p, then all wait for the
exchange; one convolution computes gA_p, gr_p and gx_p, after all have waited for it. Kernels that join the coarse term
(`KernelSet.joins_coarse`) wait before the local part instead, and then write y once.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops.exchange import LOCAL, Exchange
from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.base import Gradients, KernelSet, Wanted
from twolevel.ops.kernels.torch import TorchKernels
from twolevel.ops.problem import channel_groups


class Schedule(Protocol):
    """An order of the operations. Shapes as in `KernelSet`; `wanted` and the gradients are those of x, A, r, C."""

    def forward(
        self,
        x: Tensor,
        local: Tensor,
        restriction: Tensor,
        coarse: Tensor,
        geometry: Geometry,
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor]:
        """(y, z)."""
        ...

    def backward(
        self,
        gy: Tensor,
        x: Tensor,
        local: Tensor,
        restriction: Tensor,
        coarse: Tensor,
        z: Tensor,
        geometry: Geometry,
        exchange: Exchange,
        wanted: Wanted,
    ) -> Gradients:
        """The gradients, None where not wanted. Every rank takes part in the exchange, whatever it wants itself:
        its C feeds the other ranks' restrictions.
        """
        ...


class Overlapped:
    """Restriction, exchange in flight under the local convolution, coarse term."""

    def __init__(self, kernels: KernelSet):
        self.kernels = kernels

    def forward(self, x, local, restriction, coarse, geometry, exchange):
        if exchange is LOCAL:
            return self.kernels.whole(x, local, restriction, coarse, geometry)
        own = self.kernels.restrict(x, restriction, geometry)
        gathering = exchange.gather(own)
        y = self.kernels.local(x, local, geometry, channel_groups(x, local))
        z = gathering.wait()
        return self.kernels.add_coarse_(y, z, coarse), z

    def backward(self, gy, x, local, restriction, coarse, z, geometry, exchange, wanted):
        if exchange is LOCAL:
            return self.kernels.whole_backward(gy, x, local, restriction, coarse, z, geometry, wanted)
        want_x, want_local, want_restriction, want_coarse = wanted
        scattering = exchange.scatter_sum(self.kernels.coarse_input_grad(gy, coarse))
        g_coarse = self.kernels.coarse_weight_grad(gy, z) if want_coarse else None
        groups = channel_groups(x, local)
        gx, g_local = self.kernels.local_backward(gy, x, local, geometry, groups, (want_x, want_local))
        gz = scattering.wait()
        g_restriction = self.kernels.restrict_backward(gz, x, restriction, geometry, gx, want_restriction)
        return gx, g_local, g_restriction, g_coarse


class Fused:
    """As little as possible apart, and nothing under the exchange: the local part goes together with the restriction
    before it, or with the coarse term after it, as the kernels join them.
    """

    def __init__(self, kernels: KernelSet):
        self.kernels = kernels

    def forward(self, x, local, restriction, coarse, geometry, exchange):
        if self.kernels.joins_coarse:
            own = self.kernels.restrict(x, restriction, geometry)
            z = exchange.gather(own).wait()
            return self.kernels.local_and_coarse(x, local, geometry, channel_groups(x, local), z, coarse), z
        y, own = self.kernels.local_and_restriction(x, local, restriction, geometry)
        z = exchange.gather(own).wait()
        return self.kernels.add_coarse_(y, z, coarse), z

    def backward(self, gy, x, local, restriction, coarse, z, geometry, exchange, wanted):
        if self.kernels.joins_coarse and wanted[3]:
            gz, g_coarse = self.kernels.coarse_grads(gy, z, coarse)
            scattering = exchange.scatter_sum(gz)
        else:
            scattering = exchange.scatter_sum(self.kernels.coarse_input_grad(gy, coarse))
            g_coarse = self.kernels.coarse_weight_grad(gy, z) if wanted[3] else None
        gz = scattering.wait()
        grads = self.kernels.local_and_restriction_backward(
            gy, gz, x, local, restriction, geometry, wanted[:3]
        )
        return *grads, g_coarse


def backward_with_graph(
    gy: Tensor,
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    z: Tensor,
    geometry: Geometry,
    exchange: Exchange,
    wanted: Wanted,
) -> Gradients:
    """`Schedule.backward` for whoever differentiates its results again: by operations of torch, which autograd records.

    Across ranks the exchange refuses what it cannot differentiate.
    """
    kernels = TorchKernels("grouped")
    if exchange.ranks == 1 and wanted[3]:
        z = kernels.restrict(x, restriction, geometry)  # the one from forward is a constant to autograd
    return Overlapped(kernels).backward(gy, x, local, restriction, coarse, z, geometry, exchange, wanted)


def dense(x: Tensor, local: Tensor, restriction: Tensor, coarse: Tensor, geometry: Geometry) -> Tensor:
    """The whole layer as one dense convolution, on one rank: differentiable by autograd."""
    return F.conv2d(x, dense_weight(local, restriction, coarse, channel_groups(x, local)), None, *geometry)


def dense_weight(local: Tensor, restriction: Tensor, coarse: Tensor, groups: int | None = None) -> Tensor:
    """The dense weight of the whole layer, `[m, n, k, k]`, differentiable in its three parts.

    W[o, i] = [g(o) = g(i)] A[o, i] + sum over the representatives h of g(i) of C[o, h] r_h[i]

    There is one representative a group unless `groups` says otherwise.
    """
    groups, rows = groups or len(restriction), len(local)
    own_group = torch.eye(groups, dtype=local.dtype, device=local.device)
    own_group = own_group.repeat_interleave(rows // groups, 0)[:, :, None, None, None]
    # [m, G, R] and [G, R, n/G, k, k] to [m, G, n/G, k, k].
    through_z = torch.einsum(
        "ogr,grikl->ogikl", coarse.view(rows, groups, -1), restriction.unflatten(0, (groups, -1))
    )
    return (own_group * local[:, None] + through_z).flatten(1, 2)
