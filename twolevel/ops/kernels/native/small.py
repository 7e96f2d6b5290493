"""The small operations of the two-level convolution by C kernels: restriction and coarse term, one pass each.

Shapes with P ranks, of which this one holds G/P groups: x `[B, n/P, H, W]`, r `[G/P, n/G, kh, kw]`, y and gy
`[B, m/P, H', W']`, C `[m/P, G, 1, 1]`, z `[G, B, H', W']`. x, y and their gradients are float32 in channels_last
memory. Nothing here is recorded by autograd.

With several threads of torch the images are shared out among as many. Gradients of weights are then sums over threads,
in the order of the images: they depend on the number of threads to rounding, and on nothing else.
"""

from ctypes import byref
from functools import cache

from torch import Tensor

from twolevel.ops.geometry import Geometry
from twolevel.ops.kernels.native import call
from twolevel.ops.kernels.native.build import Unavailable, library
from twolevel.ops.kernels.native.call import LAST


@cache
def available() -> str | None:
    """None where the kernels can be used, else why not."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def version() -> str:
    """Names what the kernels were compiled from and for; empty where there are none."""
    return library().key if available() is None else ""


def restrict(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """z_g = r_g * x_g: x `[B, n, H, W]`, weight `[G, n/G, kh, kw]` -> `[G, B, H', W']`, contiguous."""
    layer = call.layer_of(x, len(weight), weight.shape[2:], geometry)
    batch, weight = len(x), weight.contiguous()
    z = x.new_empty(len(weight), batch, *layer.output)
    function = call.function("twolevel_restrict")
    arguments = (byref(layer), x.data_ptr(), weight.data_ptr(), z.data_ptr(), batch)
    call.share_out(lambda part, begin, end: function(*arguments, begin, end), call.parts_of(batch, x.numel()))
    return z


def restrict_backward(
    gz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, gx: Tensor | None, want_weight: bool
) -> Tensor | None:
    """Add the gradient of x into `gx` (channels_last) unless that is None; return the weight's if wanted."""
    layer = call.layer_of(x, len(weight), weight.shape[2:], geometry)
    assert gx is None or gx.is_contiguous(memory_format=LAST)
    batch, gz, weight = len(x), gz.contiguous(), weight.contiguous()
    parts = call.parts_of(batch, x.numel())
    gw = weight.new_empty(len(parts), *weight.shape) if want_weight else None
    function = call.function("twolevel_restrict_backward")
    arguments = (byref(layer), gz.data_ptr(), x.data_ptr(), weight.data_ptr(), call.pointer(gx))
    call.share_out(
        lambda part, begin, end: function(*arguments, call.pointer_to_row(gw, part), batch, begin, end), parts
    )
    return None if gw is None else call.total(gw)


def add_coarse_(y: Tensor, z: Tensor, coarse: Tensor) -> Tensor:
    """y + C z, accumulated into y where that is channels_last, else into a copy."""
    y = y.contiguous(memory_format=LAST)
    z, coarse, pixels = z.contiguous(), coarse.contiguous(), y[:, 0].numel()
    function = call.function("twolevel_add_coarse")
    arguments = (y.data_ptr(), z.data_ptr(), coarse.data_ptr(), *coarse.shape[:2], pixels)
    call.share_out(
        lambda part, begin, end: function(*arguments, begin, end), call.parts_of(pixels, y.numel())
    )
    return y


def coarse_input_grad(gy: Tensor, coarse: Tensor) -> Tensor:
    """C^T gy: `[G, B, H', W']`, contiguous."""
    gy = gy.contiguous(memory_format=LAST)
    gz = gy.new_empty(coarse.shape[1], len(gy), *gy.shape[2:])
    _coarse_grads(gy, None, coarse, gz, None)
    return gz


def coarse_weight_grad(gy: Tensor, z: Tensor) -> Tensor:
    """gy z^T summed over images and pixels: `[m, G, 1, 1]`."""
    gy = gy.contiguous(memory_format=LAST)
    gw = _sums(gy, z)
    _coarse_grads(gy, z, None, None, gw)
    return call.total(gw)


def coarse_grads(gy: Tensor, z: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
    """(`coarse_input_grad`, `coarse_weight_grad`) in one pass over gy."""
    gy = gy.contiguous(memory_format=LAST)
    gz, gw = gy.new_empty(z.shape), _sums(gy, z)
    _coarse_grads(gy, z, coarse, gz, gw)
    return gz, call.total(gw)


def _sums(gy: Tensor, z: Tensor) -> Tensor:
    """Where each thread adds up its gradient of C: `[threads, m, G, 1, 1]`."""
    # Zeros: of no images z has no address, which tells the kernel that no gradient is wanted.
    return gy.new_zeros(len(_parts(gy)), gy.shape[1], len(z), 1, 1)


def _parts(gy: Tensor) -> list[tuple[int, int]]:
    return call.parts_of(gy.numel() // gy.shape[1], gy.numel())


def _coarse_grads(
    gy: Tensor, z: Tensor | None, coarse: Tensor | None, gz: Tensor | None, gw: Tensor | None
) -> None:
    """Fill `gz`, which needs `coarse`, and `gw`, which needs `z`, in one pass over gy."""
    z, coarse = (None if t is None else t.contiguous() for t in (z, coarse))
    rows = len(gz) if gz is not None else gw.shape[2] if gw is not None else 0
    function = call.function("twolevel_coarse_grads")
    arguments = (gy.data_ptr(), call.pointer(z), call.pointer(coarse), call.pointer(gz))
    sizes = (gy.shape[1], rows, gy.numel() // gy.shape[1])
    call.share_out(
        lambda part, begin, end: function(*arguments, call.pointer_to_row(gw, part), *sizes, begin, end),
        _parts(gy),
    )
