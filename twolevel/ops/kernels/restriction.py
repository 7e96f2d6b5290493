"""The restriction, faster than by the group convolution of CPU libraries.

Those fill vectors with output channels. The restriction has one a group, so all lanes but one stay empty.
Two other ways to compute it:

    products    a matrix product over pixels with a row for each tap (`tap_products`); its maps are G kh kw channels
    depthwise   d_i = r[i] * x_i for every channel, then the sum of d_i over each group; its maps are n channels

Both need channels_last memory. `twolevel.ops.autotune` measures which is the fastest; without a measurement
the one with the smaller maps is used on CPUs. Measured there on one thread, batch 32, forward and backward, against the
group convolution: 64 channels of 32 x 32 in 4 groups take 0.3 of its time (products), in 16 groups 0.5 (depthwise).
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels import tap_products
from twolevel.ops.problem import Problem, channel_groups

Way = Literal["grouped", "products", "depthwise"]
WAYS: tuple[str, ...] = get_args(Way)


def ways(problem: Problem) -> tuple[Way, ...]:
    """How the problem can be restricted, the best estimate first."""
    if not problem.channels_last or problem.representatives > 1:
        return ("grouped",)
    # On CPUs depthwise convolutions and matrix products of narrower types are slow.
    if problem.device.type != "cpu" or problem.dtype not in (torch.float32, torch.float64):
        return ("grouped", "products", "depthwise")
    maps_of_products = problem.groups * problem.kernel[0] * problem.kernel[1]
    if maps_of_products <= problem.inputs:
        return ("products", "depthwise", "grouped")
    return ("depthwise", "products", "grouped")


def restrict(x: Tensor, weight: Tensor, geometry: Geometry, way: Way) -> Tensor:
    """x `[B, n, H, W]`, weight `[G, n/G, kh, kw]` -> representatives z `[G, B, H', W']`, contiguous.

    Only `grouped` takes several representatives a group, more rows of `weight` and of z.
    """
    if way == "grouped":
        return _conv(x, weight, geometry, channel_groups(x, weight)).transpose(0, 1).contiguous()
    if way == "products":
        return tap_products.forward(x, weight, geometry)
    channels = _conv(x, _by_channel(weight), geometry, x.shape[1])
    batch, number, height, width = channels.shape
    rows = channels.permute(0, 2, 3, 1).reshape(batch * height * width, number)
    return (_membership(weight) @ rows.t()).view(len(weight), batch, height, width)


def restrict_backward(
    gz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, gx: Tensor | None, want_weight: bool, way: Way
) -> Tensor | None:
    """Add the gradient of x into `gx` unless that is None; return the weight's if wanted. gz `[G, B, H', W']`."""
    if way == "products" and (gx is None or gx.is_contiguous(memory_format=torch.channels_last)):
        return tap_products.backward(gz, x, weight, geometry, gx, want_weight)
    wanted = (gx is not None, want_weight)
    if way == "depthwise":
        _, batch, height, width = gz.shape
        rows = gz.flatten(1).t() @ _membership(weight)
        channels = rows.view(batch, height, width, x.shape[1]).permute(0, 3, 1, 2)
        more, gw = conv_backward(channels, x, _by_channel(weight), geometry, x.shape[1], wanted)
        gw = None if gw is None else gw.view(weight.shape)
    else:
        more, gw = conv_backward(gz.transpose(0, 1), x, weight, geometry, channel_groups(x, weight), wanted)
    if gx is not None and more is not None:
        gx.add_(more)
    return gw


def _conv(x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    stride, padding, dilation = geometry
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def conv_backward(
    gy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(input gradient, weight gradient) of a convolution without bias, None where not wanted."""
    stride, padding, dilation = geometry
    mask = [*wanted, False]
    return torch.ops.aten.convolution_backward(
        gy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[:2]


def _by_channel(weight: Tensor) -> Tensor:
    """`[G, n/G, kh, kw]` as the weight of a depthwise convolution `[n, 1, kh, kw]`."""
    return weight.flatten(0, 1)[:, None].contiguous()


def _membership(weight: Tensor) -> Tensor:
    """`[G, n]`, 1 where a channel belongs to a group."""
    groups, width = weight.shape[:2]
    return torch.eye(groups, dtype=weight.dtype, device=weight.device).repeat_interleave(width, 1)
