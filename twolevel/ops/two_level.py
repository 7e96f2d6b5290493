"""The two-level group convolution by any of its schedules and kernels, all with the same result to rounding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops import compiled, schedules
from twolevel.ops.autocast import cast_for_convolution
from twolevel.ops.dispatch import plan_for
from twolevel.ops.exchange import LOCAL, Exchange
from twolevel.ops.geometry import Geometry
from twolevel.ops.problem import channel_groups
from twolevel.ops.ranges import in_ranges
from twolevel.ops.tape import TapedSchedule, current


def two_level_conv2d(
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    geometry: Geometry,
    *,
    schedule: str = "auto",
    kernels: str = "auto",
    exchange: Exchange = LOCAL,
) -> Tensor:
    """y_g = A_g * x_g + C_g z with z_g = r_g * x_g ("Two-level Group Convolution", arXiv 2110.05060).

    Shapes on each of P ranks that hold G/P groups each: x `[B, n/P, H, W]`, local A `[m/P, n/G, k, k]`,
    restriction r `[R G/P, n/G, k, k]`, coarse C `[m/P, R G, 1, 1]`; returns `[B, m/P, H', W']`. R is the number of
    representatives of a group, in the paper 1; those of a group are consecutive rows.

    Schedules: `overlapped` (restriction, exchange in flight under the local convolution, coarse),
    `fused` (the paper's: one convolution with m/G + R outputs a group, then the exchange, then coarse),
    `dense` (one rank only: the structured dense weight). Kernels: see `twolevel.ops.dispatch`. What is left `auto` is
    chosen by measurement. Raises UserError for what cannot compute these tensors here.
    """
    if torch.compiler.is_compiling() and exchange.ranks == 1 and _is_exporting():  # what every run time knows
        groups = channel_groups(x, local)
        z = F.conv2d(x, restriction, None, *geometry, groups)
        return F.conv2d(x, local, None, *geometry, groups) + F.conv2d(z, coarse)
    tape = None if torch.compiler.is_compiling() else current()
    skip = tape is not None and tape.skips(coarse)
    x, local, restriction, coarse = cast_for_convolution(x, local, restriction, coarse)
    if schedule == "dense" and exchange.ranks == 1:
        return schedules.dense(x, local, restriction, coarse, geometry)
    if torch.compiler.is_compiling():
        return compiled.two_level_conv2d(x, local, restriction, coarse, geometry, schedule, kernels, exchange)
    weights = (local, restriction, coarse)
    plan = plan_for(
        x, *weights, geometry, exchange.ranks, schedule, kernels, may_measure=torch.is_grad_enabled()
    )
    if plan.schedule is None:
        return schedules.dense(x, *weights, geometry)
    order = in_ranges(plan.schedule)
    order = order if tape is None else TapedSchedule(order, tape, skip=skip)
    return _TwoLevel.apply(x, *weights, geometry, exchange, order)


@torch.compiler.assume_constant_result
def _is_exporting() -> bool:
    """Whether torch.export traces; asked outside of the trace, in which torch 2.11 always says yes."""
    return torch.compiler.is_exporting()


class _TwoLevel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, local, restriction, coarse, geometry, exchange, schedule: schedules.Schedule):
        y, z = schedule.forward(x, local, restriction, coarse, geometry, exchange)
        ctx.save_for_backward(x, local, restriction, coarse, z)
        ctx.geometry, ctx.exchange, ctx.schedule = geometry, exchange, schedule
        return y

    @staticmethod
    def backward(ctx, gy):
        x, local, restriction, coarse, z = ctx.saved_tensors
        # Gradients are recorded where a second derivative is wanted.
        again = torch.is_grad_enabled()
        backward = schedules.backward_with_graph if again else ctx.schedule.backward
        wanted = ctx.needs_input_grad[:4]
        # Weights' gradients may have other strides than the weights: autograd copies them where it accumulates.
        grads = backward(gy, x, local, restriction, coarse, z, ctx.geometry, ctx.exchange, wanted)
        return *grads, None, None, None
