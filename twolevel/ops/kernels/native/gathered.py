"""Convolutions of chosen channels by C kernels, for inference: groups of any sizes, at no loss.

For the CPU and float32, in either memory format; nothing here is recorded by autograd. Rows of the output are shared
out among the threads of torch.
"""

import ctypes
from ctypes import POINTER, c_int64
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.native.call import Layer, available

# So many multiplications take about as long as moving one value, which is what threads are shared out by.
PRODUCTS = 8


def takes_frozen(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can compute from these, for a result that no gradient is asked of; not while tracing."""
    return (
        type(x) is Tensor
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and available() is None
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """`takes_frozen`, and no gradient of x is recorded, and autocast has no say."""
    return (
        takes_frozen(x, weight)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


class Plan(NamedTuple):
    """What calls of a layer for images of one size have in common: each looks it up as a whole."""

    structure: ctypes.Structure
    address: int
    output: tuple[int, ...]
    memory_format: torch.memory_format
    rows: int
    """of all images of the output"""
    work: int
    """in values that take as long to move"""

    @classmethod
    def of(cls, structure: ctypes.Structure, layer: Layer, products: int) -> "Plan":
        """`products` are those of one pixel of the output."""
        memory_format = torch.channels_last if layer.channels_last else torch.contiguous_format
        rows, output = layer.batch * layer.output[0], (layer.batch, layer.outputs, *layer.output)
        work = products * rows * layer.output[1] // PRODUCTS
        return cls(structure, ctypes.addressof(structure), output, memory_format, rows, work)


def in_a_format(x: Tensor) -> tuple[Tensor, bool]:
    """x in contiguous or channels_last memory, and whether that is the second."""
    if x.is_contiguous():
        return x, False
    last = x.is_contiguous(memory_format=torch.channels_last)
    return (x, True) if last else (x.contiguous(), False)


@dataclass(frozen=True, eq=False)
class GroupsLayer:
    """What the kernels must know of a group convolution beside its tensors."""

    sizes: tuple[tuple[int, int], ...]
    """(n_g, m_g) of each group"""
    kernel: tuple[int, int]
    geometry: Geometry
    relu: bool = False
    """whether the output is max(0, .) of the convolution and its bias"""


class _Groups(ctypes.Structure):
    """A layer for images of one size, as `layer_of_groups` in groups.c."""

    _fields_ = (
        ("layer", Layer),
        ("relu", c_int64),
        ("sizes", POINTER(c_int64)),
    )


@lru_cache(maxsize=1024)
def _plan(groups: GroupsLayer, shape: torch.Size, last: bool) -> Plan:
    sizes, outputs = groups.sizes, sum(rows for _, rows in groups.sizes)
    layer = call.layer_of(shape, outputs, len(sizes), 0, groups.kernel, groups.geometry, last)
    numbers = (c_int64 * (2 * len(sizes)))(*(number for pair in sizes for number in pair))
    products = sum(width * rows for width, rows in sizes) * groups.kernel[0] * groups.kernel[1]
    return Plan.of(_Groups(layer, groups.relu, numbers), layer, products)


def convolve_groups(
    x: Tensor,
    groups: GroupsLayer,
    filters: Tensor,
    bias: Tensor | None,
    inputs: Tensor | None,
    order: Tensor | None,
) -> Tensor:
    """Group convolution of channels from anywhere: x `[B, n, H, W]` -> `[B, m, H', W']` in the memory format of x.

    The groups read the channels `inputs` of x in turn, all of them unless given. `filters` are
    `[m_g, n_g, kh, kw]` of all groups one after the other, as is `bias` `[m]`. Channel c of the result is channel
    order[c] of the groups' outputs in turn, or channel c.
    """
    x, last = in_a_format(x)
    plan = _plan(groups, x.shape, last)
    y = torch.empty(plan.output, memory_format=plan.memory_format)
    function = call.function("twolevel_gathered")
    indices = (call.pointer(bias), call.pointer(inputs), call.pointer(order))
    arguments = (plan.address, x.data_ptr(), filters.data_ptr(), *indices, y.data_ptr())
    parts = call.parts_of(plan.rows, plan.work)
    call.share_out(lambda part, begin, end: function(*arguments, begin, end), parts)
    return y
