"""Calls of the C kernels: sizes, addresses, and the images shared out among threads."""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_double, c_int, c_int64, c_void_p
from functools import cache, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry, output_size
from twolevel.ops.kernels.native import threads
from twolevel.ops.kernels.native.build import Unavailable, library

LAST = torch.channels_last
# A thread is worth starting for so many values: about 10 microseconds of memory traffic.
WORTH_VALUES = 1 << 16


class Layer(ctypes.Structure):
    """Sizes of a layer, as `layer` in layer.h."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "channels", "outputs", "groups")),
        *((name, c_int64) for name in ("representatives", "of_group", "channels_last")),
        *((name, c_int64 * 2) for name in ("size", "output", "kernel", "stride", "padding", "dilation")),
    )


class Tensors(ctypes.Structure):
    """What a call is given, and what it is to fill, as `tensors` in two_level.h."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in ("x", "local", "restriction", "coarse", "z", "gy", "gz", "own", "y", "gz_of_all", "gx")
    )


class Maps(ctypes.Structure):
    """Sizes of maps and the numbers of their channels, as `maps` in maps.h."""

    _fields_ = (
        *((name, c_int64) for name in ("images", "channels", "pixels", "in_rows", "relu")),
        *((name, c_void_p) for name in ("mean", "inv_std", "weight", "bias")),
    )


_ARGUMENTS = {
    "twolevel_forward": [POINTER(Layer), POINTER(Tensors), *[c_int64] * 2],
    "twolevel_backward": [POINTER(Layer), POINTER(Tensors), *[c_void_p] * 3, *[c_int64] * 2],
    "twolevel_norm_moments": [POINTER(Maps), *[c_void_p] * 2, *[c_int64] * 2],
    "twolevel_norm_apply": [POINTER(Maps), *[c_void_p] * 2, *[c_int64] * 2],
    "twolevel_norm_sums": [POINTER(Maps), *[c_void_p] * 3, *[c_int64] * 2],
    "twolevel_norm_input_grad": [POINTER(Maps), *[c_void_p] * 5, *[c_int64] * 2],
    "twolevel_norm_forward": [POINTER(Maps), *[c_double] * 2, *[c_void_p] * 4, *[c_int64] * 2],
    "twolevel_norm_backward": [POINTER(Maps), *[c_void_p] * 5, *[c_int64] * 2],
    "twolevel_gathered": [*[c_void_p] * 7, *[c_int64] * 2],
    "twolevel_choose": [*[c_void_p] * 4, *[c_int64] * 2],
    "twolevel_dynamic": [*[c_void_p] * 5, *[c_int64] * 2],
}


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


@cache
def function(name: str) -> Callable[..., int]:
    """A function of the library; of those that compute, the last two arguments are where to begin and to end."""
    found = getattr(library().functions, name)
    found.argtypes, found.restype = _ARGUMENTS[name], c_int
    return found


@lru_cache(maxsize=1024)
def layer_of(
    shape: torch.Size,
    outputs: int,
    groups: int,
    representatives: int,
    kernel: tuple[int, ...],
    geometry: Geometry,
    channels_last: bool,
    of_group: int = 1,
) -> Layer:
    """Sizes of a layer for x of this shape `[B, n, H, W]`."""
    batch, channels, *size = shape
    pairs = (size, output_size(size, kernel, geometry), kernel, *geometry)
    sizes = (batch, channels, outputs, groups, representatives, of_group, channels_last)
    return Layer(*sizes, *((c_int64 * 2)(*pair) for pair in pairs))


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def pointer_to_row(tensor: Tensor | None, row: int) -> int | None:
    return None if tensor is None else tensor[row].data_ptr()


def total(parts: Tensor) -> Tensor:
    """The sum of `[parts, ...]` over parts, in their order."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def parts_of(number: int, values: int) -> list[tuple[int, int]]:
    """`range(number)` as (begin, end) for each thread; one part, which may be empty, where there is little to do."""
    parts = max(1, min(torch.get_num_threads(), number, values // WORTH_VALUES))
    if parts == 1:
        return [(0, number)]
    edges = [number * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def share_out(call: Callable[[int, int, int], int], parts: list[tuple[int, int]]) -> None:
    """Call with (part, begin, end), all parts at once. Raises MemoryError."""
    if any(threads.run(lambda part: call(part, *parts[part]), len(parts))):
        raise MemoryError("no memory for the working space of a C kernel")
