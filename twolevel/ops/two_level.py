"""The two-level group convolution by any of its schedules, all with the same result to rounding."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.errors import unknown
from twolevel.ops.geometry import Geometry
from twolevel.ops.overlapped import LOCAL, Exchange, channel_major, overlapped

Schedule = Literal["auto", "overlapped", "fused", "dense"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def two_level_conv2d(
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    geometry: Geometry,
    *,
    schedule: Schedule = "auto",
    exchange: Exchange = LOCAL,
) -> Tensor:
    """y_g = A_g * x_g + C_g z with z_g = r_g * x_g ("Two-level Group Convolution", arXiv 2110.05060).

    Shapes on each of P ranks that hold G/P groups each: x `[B, n/P, H, W]`, local A `[m/P, n/G, k, k]`,
    restriction r `[G/P, n/G, k, k]`, coarse C `[m/P, G, 1, 1]`; returns `[B, m/P, H', W']`.

    Schedules: `overlapped` (restriction, exchange in flight under the local convolution, coarse),
    `fused` (the paper's: one convolution with m/G + 1 outputs a group, then the exchange, then coarse),
    `dense` (one rank only: the structured dense weight), `auto` (overlapped).
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if schedule == "dense":
        assert exchange.ranks == 1, "the dense schedule needs every channel on one rank"
        return F.conv2d(x, dense_weight(local, restriction, coarse), None, *geometry)
    if schedule == "fused":
        return _fused(x, local, restriction, coarse, geometry, exchange)
    return overlapped(x, local, restriction, coarse, geometry, exchange)


def dense_weight(local: Tensor, restriction: Tensor, coarse: Tensor) -> Tensor:
    """The dense weight of the whole layer, `[m, n, k, k]`, differentiable in its three parts.

    W[o, i] = [g(o) = g(i)] A[o, i] + C[o, g(i)] r_{g(i)}[i]
    """
    groups, rows = len(restriction), len(local)
    own_group = torch.eye(groups, dtype=local.dtype, device=local.device)
    own_group = own_group.repeat_interleave(rows // groups, 0)[:, :, None, None, None]
    weight = own_group * local[:, None] + coarse[:, :, None] * restriction[None]
    return weight.flatten(1, 2)


class _Gather(torch.autograd.Function):
    """The exchange in one piece. Each rank uses z in its own way, so backward sums their gradients."""

    @staticmethod
    def forward(ctx, own, exchange):
        ctx.exchange = exchange
        return exchange.gather(own).wait()

    @staticmethod
    def backward(ctx, gz):
        return ctx.exchange.scatter_sum(gz.contiguous()).wait(), None


def _fused(x, local, restriction, coarse, geometry, exchange):
    groups = len(restriction)
    # [G, m/G + 1, n/G, k, k]: the restriction is one more output of its group.
    weight = torch.cat([local.unflatten(0, (groups, -1)), restriction[:, None]], 1)
    out = F.conv2d(x, weight.flatten(0, 1), None, *geometry, groups)
    last = out.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    out = out.unflatten(1, (groups, -1))
    z = _Gather.apply(channel_major(out[:, :, -1]), exchange).transpose(0, 1)
    y = out[:, :, :-1].flatten(1, 2) + F.conv2d(z, coarse)
    return y.contiguous(memory_format=memory_format)
