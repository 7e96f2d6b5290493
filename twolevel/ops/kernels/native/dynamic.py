"""The dynamic group convolution of inference by C kernels: choice of channels, and convolution of those alone.

For the CPU and float32, in either memory format; nothing here is recorded by autograd. With several threads of torch
images are shared out among them to choose, and rows of the output to convolve; with one it is all one call.
"""

import ctypes
from ctypes import c_float, c_int64
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.native.call import Layer
from twolevel.ops.kernels.native.gathered import Plan, in_a_format

_COPIED = ("hidden", "kept", "by_output", "first_tap", "by_tap", "has_bias", "relu")


@dataclass(frozen=True, eq=False)
class DynamicLayer:
    """What the kernels must know of a layer of H heads beside its numbers."""

    heads: int
    kernel: tuple[int, int]
    geometry: Geometry
    outputs: int
    """output channels of a head"""
    hidden: int
    """hidden units of a head's saliency network, r"""
    kept: int
    """channels that a head keeps, or -1 for those above the threshold"""
    by_output: int
    """where weights lie, from the first of their head and input channel: from one output to the next"""
    first_tap: int
    """the first tap"""
    by_tap: int
    """from one tap to the next"""
    bound: float
    """of what kept channels are multiplied with"""
    has_bias: bool = False
    relu: bool = False
    """whether the output is max(0, .) of the convolution and its bias"""


class _Dynamic(ctypes.Structure):
    """A layer for images of one size, as `dynamic` in dynamic.c."""

    _fields_ = (("layer", Layer), *((name, c_int64) for name in _COPIED), ("bound", c_float))


@lru_cache(maxsize=1024)
def _plan(layer: DynamicLayer, shape: torch.Size, last: bool) -> Plan:
    outputs, kept = layer.heads * layer.outputs, shape[1] if layer.kept < 0 else layer.kept
    sizes = call.layer_of(shape, outputs, layer.heads, 0, layer.kernel, layer.geometry, last)
    structure = _Dynamic(sizes, *(getattr(layer, name) for name in _COPIED), layer.bound)
    return Plan.of(structure, sizes, kept * outputs * layer.kernel[0] * layer.kernel[1])


def convolve_kept(x: Tensor, layer: DynamicLayer, numbers: Tensor) -> Tensor:
    """x `[B, n, H, W]` -> y `[B, m, H', W']` in its memory format, channel j of head h at j heads + h.

    `numbers` are sign and shift `[n]`, squeeze `[n, H r]`, excite `[H, r, n]`, offset `[H, n]`, threshold `[1]`,
    weights `[H n, m/H kh kw]` and, where there is one, a bias `[H, m/H]`, one after the other. With

        t = max(0, sign x + shift),  g = max(0, offset + max(0, mean(t) squeeze) excite)

    a head keeps the channels of largest g, of equal ones the last, or those of g above the threshold, and convolves
    t times g of those.
    """
    x, last = in_a_format(x)
    plan = _plan(layer, x.shape, last)
    y = torch.empty(plan.output, memory_format=plan.memory_format)
    image, result = (plan.address, x.data_ptr(), numbers.data_ptr()), y.data_ptr()
    convolve, parts = call.function("twolevel_dynamic"), call.parts_of(plan.rows, plan.work)
    if len(parts) == 1:
        call.share_out(lambda part, begin, end: convolve(*image, None, result, begin, end), parts)
        return y
    batch, channels = x.shape[:2]
    kept = torch.empty(batch, layer.heads, 1 + channels + (channels + 1) // 2, dtype=torch.int64)
    choose, choice = call.function("twolevel_choose"), (*image, kept.data_ptr())
    call.share_out(lambda part, begin, end: choose(*choice, begin, end), call.parts_of(batch, x.numel()))
    call.share_out(lambda part, begin, end: convolve(*choice, result, begin, end), parts)
    return y
