"""Calls of the C kernels for a two-level convolution, forward and backward, of all its parts or of some.

Shapes with P ranks, of which this one holds G/P groups, and R representatives a group: x `[B, n/P, H, W]`,
A `[m/P, n/G, kh, kw]`, r `[R G/P, n/G, kh, kw]`, C `[m/P, R G, 1, 1]`, y and gy `[B, m/P, H', W']`,
z `[R G, B, H', W']`. All are float32; x, y and their gradients lie contiguous or channels_last, all alike. Nothing
here is recorded by autograd.

With several threads of torch the images are shared out among as many. Gradients of weights are then sums over threads,
in the order of the images: they depend on the number of threads to rounding, and on nothing else.
"""

import math
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.native.call import Layer, Tensors, pointer, pointer_to_row
from twolevel.ops.problem import channel_groups
from twolevel.ops.strides import memory_format_of

ONE_BY_ONE = torch.Size((1, 1))


def layer_of(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    *,
    representatives: int = 0,
    restriction: Tensor | None = None,
) -> Layer:
    """Sizes of a layer for x, whose A, or else r, is `weight`; with a coarse term, of all ranks' representatives."""
    groups = channel_groups(x, weight)
    of_group = 1 if restriction is None else len(restriction) // groups
    last = memory_format_of(x) is torch.channels_last
    sizes = (len(weight), groups, representatives, weight.shape[2:])
    return call.layer_of(x.shape, *sizes, geometry, last, of_group)


def coarse_layer_of(y: Tensor, representatives: int) -> Layer:
    """Sizes of the coarse term alone, which knows nothing of x."""
    batch, outputs, *size = y.shape
    last = memory_format_of(y) is torch.channels_last
    shape = torch.Size((batch, 1, *size))
    return call.layer_of(shape, outputs, 1, representatives, ONE_BY_ONE, Geometry(), last)


def forward(
    layer: Layer,
    x: Tensor | None = None,
    local: Tensor | None = None,
    restriction: Tensor | None = None,
    coarse: Tensor | None = None,
    z: Tensor | None = None,
    own: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Fill `own` with the representatives of this rank, if given, and `y` with A x + C z; without A add to it."""
    x = _images(x, layer)
    local, restriction, coarse, z = map(_contiguous, (local, restriction, coarse, z))
    tensors = Tensors(*map(pointer, (x, local, restriction, coarse, z, None, None, own, y)))
    function = call.function("twolevel_forward")
    arguments = (byref(layer), byref(tensors))
    call.share_out(lambda part, begin, end: function(*arguments, begin, end), _parts(layer))


def backward(
    layer: Layer,
    gy: Tensor | None = None,
    x: Tensor | None = None,
    local: Tensor | None = None,
    restriction: Tensor | None = None,
    coarse: Tensor | None = None,
    z: Tensor | None = None,
    gz: Tensor | None = None,
    gz_of_all: Tensor | None = None,
    gx: Tensor | None = None,
    wanted: Sequence[torch.Size | None] = (None, None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of A, r and C, of those that have a shape in `wanted`. Fill `gx`, if given, with A^T gy + r^T gz;
    without A add to it.

    gz is C^T gy where C is given, and is left in `gz_of_all` if that is; else it is `gz`, the sum over ranks.
    """
    gy, x = _images(gy, layer), _images(x, layer)
    local, restriction, coarse, z, gz = map(_contiguous, (local, restriction, coarse, z, gz))
    parts = _parts(layer)
    # Where each thread adds up its part.
    sums = [None if shape is None else torch.empty(len(parts), *shape) for shape in wanted]
    given = (x, local, restriction, coarse, z, gy, gz)
    tensors = Tensors(*map(pointer, (*given, None, None, gz_of_all, gx)))
    function = call.function("twolevel_backward")
    arguments = (byref(layer), byref(tensors))

    def run(part: int, begin: int, end: int) -> int:
        return function(*arguments, *(pointer_to_row(own, part) for own in sums), begin, end)

    call.share_out(run, parts)
    g_local, g_restriction, g_coarse = (None if own is None else call.total(own) for own in sums)
    return g_local, g_restriction, g_coarse


def _parts(layer: Layer) -> list[tuple[int, int]]:
    """The images for each thread."""
    values = max(layer.channels * math.prod(layer.size), layer.outputs * math.prod(layer.output))
    return call.parts_of(layer.batch, layer.batch * values)


def _images(x: Tensor | None, layer: Layer) -> Tensor | None:
    """In the memory format of the layer."""
    memory = torch.channels_last if layer.channels_last else torch.contiguous_format
    return None if x is None else x.contiguous(memory_format=memory)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
