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
from twolevel.ops.kernels.native.call import LAST, available

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


def in_a_format(x: Tensor) -> tuple[Tensor, bool]:
    """x in contiguous or channels_last memory, and whether that is the second."""
    if x.is_contiguous():
        return x, False
    last = x.is_contiguous(memory_format=LAST)
    return (x, True) if last else (x.contiguous(), False)


def empty(shape: tuple[int, ...], last: bool) -> Tensor:
    """Room for float32 images in channels_last memory or not."""
    return torch.empty(shape, memory_format=LAST if last else torch.contiguous_format, dtype=torch.float32)


def convolve_groups(
    x: Tensor,
    filters: Tensor,
    sizes: tuple[tuple[int, int], ...],
    inputs: Tensor | None,
    order: Tensor | None,
    kernel: tuple[int, int],
    geometry: Geometry,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Group convolution of channels from anywhere: x `[B, n, H, W]` -> `[B, m, H', W']` in the memory format of x.

    `sizes` are (n_g, m_g) of each group; the groups read the channels `inputs` of x in turn, all of them unless
    given. `filters` are `[m_g, n_g, kh, kw]` of all groups one after the other. Channel c of the result is
    channel order[c] of the groups' outputs in turn, or channel c. `bias` `[m]` is added to the result, and with
    `relu` the result is max(0, .) of that.
    """
    x, last = in_a_format(x)
    layer = call.layer_of_image(x.shape[1:], len(sizes), kernel, geometry)
    batch, outputs = x.shape[0], sum(rows for _, rows in sizes)
    y = empty((batch, outputs, *layer.output), last)
    function = call.function("twolevel_gathered")
    pointers = (call.pointer(tensor) for tensor in (inputs, order, bias, y))
    arguments = (
        byref(layer),
        x.data_ptr(),
        filters.data_ptr(),
        _numbers(sizes),
        *pointers,
        outputs,
        relu,
        last,
    )
    rows = batch * layer.output[0]
    work = filters.numel() * rows * layer.output[1] // PRODUCTS
    call.share_out(lambda part, begin, end: function(*arguments, begin, end), call.parts_of(rows, work))
    return y


@lru_cache(maxsize=1024)
def _numbers(sizes: tuple[tuple[int, int], ...]) -> Array[c_int64]:
    return (c_int64 * (2 * len(sizes)))(*(number for pair in sizes for number in pair))
