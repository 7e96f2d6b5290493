"""Convolutions of chosen channels by C kernels, for inference: groups of any sizes, at no loss.

For the CPU and float32, in either memory format; nothing here is recorded by autograd. Rows of the output are shared
out among the threads of torch.
"""

from ctypes import Array, byref, c_int64
from functools import lru_cache

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.native.call import available

LAST = torch.channels_last
# So many multiplications take about as long as moving one value, which is what threads are shared out by.
PRODUCTS = 8


def takes(x: Tensor) -> bool:
    """Whether the kernels can compute from x: not what autograd or autocast acts on, or what is being traced."""
    return (
        type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and available() is None
    )


def convolve_groups(
    x: Tensor,
    filters: Tensor,
    sizes: tuple[tuple[int, int], ...],
    inputs: Tensor | None,
    order: Tensor | None,
    kernel: tuple[int, int],
    geometry: Geometry,
) -> Tensor:
    """Group convolution of channels from anywhere: x `[B, n, H, W]` -> `[B, m, H', W']` in the memory format of x.

    `sizes` are (n_g, m_g) of each group; the groups read the channels `inputs` of x in turn, all of them unless
    given. `filters` are `[m_g, n_g, kh, kw]` of all groups one after the other. Channel c of the result is
    channel order[c] of the groups' outputs in turn, or channel c.
    """
    if not x.is_contiguous():
        x = x.contiguous(memory_format=LAST)
    last, batch, outputs = not x.is_contiguous(), len(x), sum(rows for _, rows in sizes)
    layer = call.layer_of(x.shape, outputs, len(sizes), 0, torch.Size(kernel), geometry, last)
    memory_format = LAST if last else torch.contiguous_format
    y = torch.empty((batch, outputs, *layer.output), memory_format=memory_format)
    function = call.function("twolevel_gathered")
    indices = (call.pointer(inputs), call.pointer(order), y.data_ptr(), outputs, last)
    arguments = (byref(layer), x.data_ptr(), filters.data_ptr(), _numbers(sizes), *indices)
    rows = batch * layer.output[0]
    work = filters.numel() * rows * layer.output[1] // PRODUCTS
    call.share_out(lambda part, begin, end: function(*arguments, begin, end), call.parts_of(rows, work))
    return y


@lru_cache(maxsize=1024)
def _numbers(sizes: tuple[tuple[int, int], ...]) -> Array[c_int64]:
    return (c_int64 * (2 * len(sizes)))(*(number for pair in sizes for number in pair))
