"""The restriction as matrix products over pixels, a row for each tap of the kernel.

    u[g, t] = r_g[:, t] . x_g                            [T, n/G] x [n/G, pixels]: a map for each of T = kh kw taps
    z[g]    = sum over t of u[g, t], shifted by the tap

x has to be in channels_last memory, where a group's pixels are the rows of a strided matrix.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from twolevel.ops.geometry import Geometry, output_size

# Groups narrower than this share a product, with zeros between them: still cheaper than narrow products.
NARROW = 16


def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """x `[B, n, H, W]`, weight `[G, n/G, kh, kw]` -> z `[G, B, H', W']`, contiguous."""
    groups, _, *kernel = weight.shape
    batch, _, *size = x.shape
    maps = torch.bmm(_pack(weight), _pixels(x, weight).transpose(1, 2)).view(groups, *kernel, batch, *size)
    if (*kernel, *geometry.stride, *geometry.padding) == (1, 1, 1, 1, 0, 0):
        return maps[:, 0, 0]
    output = output_size(size, kernel, geometry)
    z = x.new_zeros(groups, batch, *output)
    for row, column, into, source in _taps(geometry, kernel, size, output):
        z[into] += maps[:, row, column][source]
    return z


def backward(
    gz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, gx: Tensor | None, want_weight: bool
) -> Tensor | None:
    """Add the gradient of x into `gx` (channels_last) unless that is None; return the weight's if wanted.

    gz `[G, B, H', W']`. The transposes of the two steps of `forward`.
    """
    groups, width, *kernel = weight.shape
    batch, _, *size = x.shape
    maps = gz.new_zeros(groups, *kernel, batch, *size)
    for row, column, into, source in _taps(geometry, kernel, size, gz.shape[2:]):
        maps[:, row, column][source] = gz[into]
    packed = _pack(weight)
    maps = maps.view(*packed.shape[:2], batch * size[0] * size[1])
    if gx is not None:
        _pixels(gx, weight).baddbmm_(maps.transpose(1, 2), packed)
    if not want_weight:
        return None
    share = groups // len(packed)
    blocks = torch.bmm(maps, _pixels(x, weight)).view(len(packed), share, *kernel, share, width)
    return blocks.diagonal(dim1=1, dim2=4).permute(0, 4, 3, 1, 2).reshape(weight.shape)


def _share(weight: Tensor) -> int:
    """How many groups share a product."""
    groups, width = weight.shape[:2]
    share = 1
    while share * width < NARROW and groups % (2 * share) == 0:
        share *= 2
    return share


def _pack(weight: Tensor) -> Tensor:
    """`[G, n/G, kh, kw]` to `[G/s, s T, s n/G]`: the taps of s groups in the blocks of a diagonal."""
    share = _share(weight)
    taps = weight.flatten(2).transpose(1, 2)  # [G, T, n/G]
    products, (count, width) = len(weight) // share, taps.shape[1:]
    packed = weight.new_zeros(products, share, count, share, width)
    packed.diagonal(dim1=1, dim2=3).copy_(taps.view(products, share, count, width).permute(0, 2, 3, 1))
    return packed.view(products, share * count, share * width)


def _pixels(x: Tensor, weight: Tensor) -> Tensor:
    """`[B, n, H, W]` in channels_last memory as `[G/s, pixels, s n/G]`, a view."""
    products = len(weight) // _share(weight)
    rows = x.permute(0, 2, 3, 1).view(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])
    return rows.view(len(rows), products, x.shape[1] // products).transpose(0, 1)


def _taps(geometry: Geometry, kernel, size, output) -> Iterator[tuple[int, int, tuple, tuple]]:
    """For each tap of the kernel: its row and column, the outputs it adds to, and the inputs they read."""
    whole = slice(None)
    for row in range(kernel[0]):
        into_y, from_y = _reach(geometry, 0, row, size[0], output[0])
        for column in range(kernel[1]):
            into_x, from_x = _reach(geometry, 1, column, size[1], output[1])
            if into_y.start < into_y.stop and into_x.start < into_x.stop:
                yield row, column, (whole, whole, into_y, into_x), (whole, whole, from_y, from_x)


def _reach(geometry: Geometry, dim: int, tap: int, size: int, output: int) -> tuple[slice, slice]:
    """Output o reads input o stride + tap dilation - padding, where that lies within the input."""
    step, shift = geometry.stride[dim], tap * geometry.dilation[dim] - geometry.padding[dim]
    first = max(0, -(shift // step))  # the least o with o step + shift >= 0
    last = min(output - 1, (size - 1 - shift) // step)
    start = first * step + shift
    return slice(first, last + 1), slice(start, start + max(0, last - first) * step + 1, step)
