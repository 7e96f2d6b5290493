"""Group convolution with narrow groups by C kernels, where CPU libraries leave most of a vector empty.

float32 in channels_last memory; nothing here is recorded by autograd. Threads as in `small`.
"""

from ctypes import byref

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.native.call import LAST
from twolevel.ops.problem import Problem


def fills_vectors(problem: Problem) -> bool:
    """Whether vectors of input and of output channels hold whole groups or parts of one, as the kernels need."""
    lanes = call.function("twolevel_lanes")()
    widths = [(channels, channels // problem.groups) for channels in (problem.inputs, problem.outputs)]
    return all(
        channels % lanes == 0 and (lanes % width == 0 or width % lanes == 0) for channels, width in widths
    )


def local_wins(problem: Problem) -> bool:
    """Whether the kernels were measured to be faster than torch's forward and backward together.

    Measured on one thread with vectors of 16 numbers, of which groups of 1, 2, 4 or 8 channels fill a part: 0.15 to
    0.8 of the time of oneDNN. It is as fast itself where every channel is a group and in 1 x 1 kernels from 8 channels
    to 8, and twice as fast from 16 to 16.
    """
    inputs, outputs = problem.inputs // problem.groups, problem.outputs // problem.groups
    return (
        1 < max(inputs, outputs) <= 8
        and (min(inputs, outputs) < 8 or problem.kernel != (1, 1))
        and call.function("twolevel_lanes")() == 16
    )


def local(x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """A * x in groups: x `[B, n, H, W]`, weight `[m, n/G, kh, kw]` -> `[B, m, H', W']`, both channels_last."""
    layer = call.layer_of(x, groups, weight.shape[2:], geometry)
    batch, outputs, weight = len(x), len(weight), weight.contiguous()
    y = torch.empty(batch, outputs, *layer.output, memory_format=LAST)
    function = call.function("twolevel_local")
    arguments = (byref(layer), x.data_ptr(), weight.data_ptr(), y.data_ptr(), outputs)
    call.share_out(lambda part, begin, end: function(*arguments, begin, end), call.parts_of(batch, y.numel()))
    return y


def local_backward(
    gy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, groups: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x (channels_last) and of the weight, None where not wanted."""
    layer = call.layer_of(x, groups, weight.shape[2:], geometry)
    batch, gy, weight = len(x), gy.contiguous(memory_format=LAST), weight.contiguous()
    parts = call.parts_of(batch, gy.numel())
    gx = torch.empty(x.shape, memory_format=LAST) if wanted[0] else None
    gw = weight.new_empty(len(parts), *weight.shape) if wanted[1] else None
    function = call.function("twolevel_local_backward")
    arguments = (byref(layer), gy.data_ptr(), x.data_ptr(), weight.data_ptr(), call.pointer(gx))
    call.share_out(
        lambda part, begin, end: function(*arguments, call.pointer_to_row(gw, part), len(weight), begin, end),
        parts,
    )
    return gx, None if gw is None else call.total(gw)
