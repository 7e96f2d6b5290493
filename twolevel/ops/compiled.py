"""The two-level convolution as one operation of a compiled graph, exchange included.

torch.compile sees one operator forward and one backward, and does not break its graph there; inside them
everything runs as in eager mode: schedule, kernels, the exchange under the local convolution.
"""

import torch
from torch import Tensor

from twolevel.ops import schedules
from twolevel.ops.dispatch import plan_for
from twolevel.ops.exchange import Exchange, registered
from twolevel.ops.geometry import Geometry, output_size
from twolevel.ops.ranges import in_ranges
from twolevel.ops.strides import in_strides_of, memory_format_of


def two_level_conv2d(
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    geometry: Geometry,
    schedule: str,
    kernels: str,
    exchange: Exchange,
) -> Tensor:
    """As `twolevel.ops.two_level_conv2d`, for a trace."""
    number = exchange.key
    return _forward(
        x,
        local,
        restriction,
        coarse,
        *map(list, geometry),
        schedule,
        kernels,
        exchange.ranks,
        number,
        torch.is_grad_enabled(),
    )[0]


@torch.library.custom_op("twolevel::two_level_conv2d", mutates_args=())
def _forward(
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    schedule: str,
    kernels: str,
    ranks: int,
    exchange: str,
    may_measure: bool,
) -> tuple[Tensor, Tensor]:
    geometry = Geometry.of_lists(stride, padding, dilation)
    tensors = (x, local, restriction, coarse)
    chosen = _schedule(*tensors, geometry, ranks, schedule, kernels, may_measure)
    return chosen.forward(*tensors, geometry, registered(exchange))


@_forward.register_fake
def _(x, local, restriction, coarse, stride, padding, dilation, *how):
    batch, _, *size = x.shape
    height, width = output_size(size, local.shape[2:], Geometry.of_lists(stride, padding, dilation))
    y = x.new_empty(batch, len(local), height, width).to(memory_format=memory_format_of(x))
    return y, x.new_empty(coarse.shape[1], batch, height, width)


@torch.library.custom_op("twolevel::two_level_conv2d_backward", mutates_args=())
def _backward(
    gy: Tensor,
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    z: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    schedule: str,
    kernels: str,
    ranks: int,
    exchange: str,
    may_measure: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = Geometry.of_lists(stride, padding, dilation)
    # An operator returns tensors, in strides that the compiler knows beforehand.
    likes = (x, local, restriction, coarse)
    chosen = _schedule(*likes, geometry, ranks, schedule, kernels, may_measure)
    gradients = chosen.backward(gy, *likes, z, geometry, registered(exchange), _four(wanted))
    gx, g_local, g_restriction, g_coarse = (
        x.new_empty(0) if gradient is None else in_strides_of(gradient, like)
        for gradient, like in zip(gradients, likes, strict=True)
    )
    return gx, g_local, g_restriction, g_coarse


@_backward.register_fake
def _(gy, x, local, restriction, coarse, z, *rest):
    likes = zip((x, local, restriction, coarse), rest[-1], strict=True)
    return tuple(torch.empty_like(like) if want else x.new_empty(0) for like, want in likes)


def _setup(ctx, inputs, output) -> None:
    x, local, restriction, coarse, *rest = inputs
    ctx.save_for_backward(x, local, restriction, coarse, output[1])
    ctx.rest = rest
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, gy, _):
    wanted = [*ctx.needs_input_grad[:4]]
    if torch.is_grad_enabled():  # a second derivative is wanted, which the operator below has not
        stride, padding, dilation, _, _, _, exchange, _ = ctx.rest
        geometry = Geometry.of_lists(stride, padding, dilation)
        x, local, restriction, coarse, z = ctx.saved_tensors
        found = schedules.backward_with_graph(
            gy, x, local, restriction, coarse, z, geometry, registered(exchange), _four(wanted)
        )
        return *found, *[None] * len(ctx.rest)
    found = _backward(gy, *ctx.saved_tensors, *ctx.rest, wanted)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *[None] * len(ctx.rest)


_forward.register_autograd(_gradients, setup_context=_setup)


def _schedule(
    x: Tensor,
    local: Tensor,
    restriction: Tensor,
    coarse: Tensor,
    geometry: Geometry,
    ranks: int,
    schedule: str,
    kernels: str,
    may_measure: bool,
) -> schedules.Schedule:
    # Not dense, which would be a composition of torch's operations that the compiler sees: it is asked for by name.
    plan = plan_for(
        *(x, local, restriction, coarse, geometry, ranks, schedule, kernels),
        may_measure=may_measure,
        may_be_dense=False,
    )
    assert plan.schedule is not None
    return in_ranges(plan.schedule)


def _four(wanted: list[bool]) -> tuple[bool, bool, bool, bool]:
    x, local, restriction, coarse = wanted
    return x, local, restriction, coarse
