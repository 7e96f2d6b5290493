"""The balanced group convolution, whose mean over groups is exchanged under its local convolution.

              rank p                                        the link
    forward   s_p = sum of its x_g / G
              start all-reduce  -------------------------->  x_mean = sum over ranks of s_p
              y_p = A_p * x_p                                    |
              wait  <--------------------------------------------+
              y_p += B_p * x_mean

    backward  t_p = B_p^T gy_p / G
              start all-reduce  -------------------------->  t = sum over ranks of t_p
              gA_p, gB_p, gx_p from gy_p                         |
              wait  <--------------------------------------------+
              gx_g += t for each of its groups

Why backward sums: all ranks hold the same x_mean, but each computes outputs of its own from it, so the gradient of
x_mean is B_p^T gy_p summed over ranks. (The sum of the logits is another case: what follows it is the same on every
rank, so its gradient is whole on each.) Channel i of every group is in x_mean[i] with weight 1/G: it gets 1/G of that.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops.autocast import cast_for_convolution
from twolevel.ops.exchange import LOCAL, Exchange, registered
from twolevel.ops.geometry import Geometry, output_size
from twolevel.ops.kernels.restriction import conv_backward
from twolevel.ops.problem import channel_groups
from twolevel.ops.ranges import exchange_in_ranges
from twolevel.ops.strides import in_strides_of, memory_format_of
from twolevel.ops.tape import TapedExchange, current

Wanted = tuple[bool, bool, bool]
"""Which gradients are: of x, A and B."""


def balanced_conv2d(
    x: Tensor, local: Tensor, mean: Tensor, geometry: Geometry, *, exchange: Exchange = LOCAL
) -> Tensor:
    """y_g = A_g * x_g + B_g * x_mean, x_mean = (x_1 + ... + x_G) / G ("Balanced Group Convolution", arXiv 2310.12461).

    Shapes on each of P ranks that hold G/P groups each: x `[B, n/P, H, W]`, local A and mean B `[m/P, n/G, k, k]`;
    returns `[B, m/P, H', W']`.

    Across ranks second derivatives raise NotImplementedError; on one rank autograd has them.
    """
    x, local, mean = cast_for_convolution(x, local, mean)
    if exchange.ranks == 1:
        groups = channel_groups(x, local)
        # Two convolutions, which on CPUs are faster than one over [x_g, x_mean] of every group.
        y = F.conv2d(x, local, None, *geometry, groups)
        return y.add_(F.conv2d(_mean_of_groups(x, groups), mean, None, *geometry))
    if torch.compiler.is_compiling():
        return _forward_compiled(x, local, mean, *map(list, geometry), exchange.key)[0]
    tape = current()
    if tape is not None:
        exchange = TapedExchange(exchange, tape)
    return _Balanced.apply(x, local, mean, geometry, exchange_in_ranges(exchange))


def _mean_of_groups(x: Tensor, groups: int) -> Tensor:
    """`[B, G c, H, W] -> [B, c, H, W]` in the memory format of x: on CPUs, along its inner dimension."""
    if memory_format_of(x) == torch.channels_last:
        return x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).mean(3).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).mean(1)


def _forward(
    x: Tensor, local: Tensor, mean: Tensor, geometry: Geometry, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """y, and x_mean as it was sent: `[B, H, W, n/G]`."""
    groups = channel_groups(x, local)
    summing = exchange.sum(_to_send(_mean_of_groups(x, groups) / exchange.ranks))
    y = F.conv2d(x, local, None, *geometry, groups)
    sent = summing.wait()
    y.add_(F.conv2d(_received(sent, x), mean, None, *geometry))
    return y.contiguous(memory_format=memory_format_of(x)), sent


def _backward(
    gy: Tensor,
    x: Tensor,
    sent: Tensor,
    local: Tensor,
    mean: Tensor,
    geometry: Geometry,
    exchange: Exchange,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, A and B, None where not wanted. All ranks want that of x or none does."""
    want_x, want_local, want_mean = wanted
    groups, x_mean, summing = channel_groups(x, local), _received(sent, x), None
    if want_x:
        t, _ = conv_backward(gy, x_mean, mean, geometry, 1, (True, False))
        assert t is not None
        summing = exchange.sum(_to_send(t / (groups * exchange.ranks)))
    gx, g_local = conv_backward(gy, x, local, geometry, groups, (want_x, want_local))
    _, g_mean = conv_backward(gy, x_mean, mean, geometry, 1, (False, want_mean))
    if summing is not None:
        assert gx is not None
        gx.unflatten(1, (groups, -1)).add_(_received(summing.wait(), x)[:, None])
    return gx, g_local, g_mean


def _to_send(maps: Tensor) -> Tensor:
    """`[B, c, H, W]` as `[B, H, W, c]`: a sum over ranks adds memory up, which so lies alike on all of them."""
    return maps.permute(0, 2, 3, 1).contiguous()


def _received(sent: Tensor, x: Tensor) -> Tensor:
    """`[B, H, W, c]` as `[B, c, H, W]` in the memory format of x."""
    return sent.permute(0, 3, 1, 2).contiguous(memory_format=memory_format_of(x))


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, local: Tensor, mean: Tensor, geometry: Geometry, exchange: Exchange
    ) -> Tensor:
        y, sent = _forward(x, local, mean, geometry, exchange)
        ctx.save_for_backward(x, sent, local, mean)
        ctx.geometry, ctx.exchange = geometry, exchange
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, sent, local, mean = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        return *_backward(gy, x, sent, local, mean, ctx.geometry, ctx.exchange, wanted), None, None


# As one operation of a compiled graph, which would break at the exchange.


@torch.library.custom_op("twolevel::balanced_conv2d", mutates_args=())
def _forward_compiled(
    x: Tensor,
    local: Tensor,
    mean: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    exchange: str,
) -> tuple[Tensor, Tensor]:
    return _forward(x, local, mean, Geometry.of_lists(stride, padding, dilation), registered(exchange))


@_forward_compiled.register_fake
def _(x, local, mean, stride, padding, dilation, exchange):
    batch, _, *size = x.shape
    height, width = output_size(size, local.shape[2:], Geometry.of_lists(stride, padding, dilation))
    y = x.new_empty(batch, len(local), height, width).to(memory_format=memory_format_of(x))
    return y, x.new_empty(batch, *size, local.shape[1])


@torch.library.custom_op("twolevel::balanced_conv2d_backward", mutates_args=())
def _backward_compiled(
    gy: Tensor,
    x: Tensor,
    sent: Tensor,
    local: Tensor,
    mean: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    exchange: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    want_x, want_local, want_mean = wanted
    geometry = Geometry.of_lists(stride, padding, dilation)
    gradients = _backward(
        gy, x, sent, local, mean, geometry, registered(exchange), (want_x, want_local, want_mean)
    )
    # An operator returns tensors, in strides that the compiler knows beforehand.
    gx, g_local, g_mean = (
        x.new_empty(0) if gradient is None else in_strides_of(gradient, like)
        for gradient, like in zip(gradients, (x, local, mean), strict=True)
    )
    return gx, g_local, g_mean


@_backward_compiled.register_fake
def _(gy, x, sent, local, mean, stride, padding, dilation, exchange, wanted):
    likes = zip((x, local, mean), wanted, strict=True)
    return tuple(torch.empty_like(like) if want else x.new_empty(0) for like, want in likes)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, local, mean, *ctx.rest = inputs
    ctx.save_for_backward(x, output[1], local, mean)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, gy: Tensor, _: Any) -> Any:
    x, sent, local, mean = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    none = [None] * len(ctx.rest)
    if torch.is_grad_enabled():  # a second derivative is wanted, which the operator below has not
        *geometry, exchange = ctx.rest
        how = Geometry.of_lists(*geometry), registered(exchange)
        return *_backward(gy, x, sent, local, mean, *how, wanted), *none
    found = _backward_compiled(gy, x, sent, local, mean, *ctx.rest, [*wanted])
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *none


_forward_compiled.register_autograd(_gradients, setup_context=_setup)
