"""Strides, paddings and dilations."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution, each (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
