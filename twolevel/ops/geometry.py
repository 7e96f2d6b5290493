"""Strides, paddings and dilations, and what size of output they give."""

from collections.abc import Sequence
from typing import NamedTuple, Self


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution, each (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of_lists(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Self:
        """From the lists that operators of a compiled graph take."""
        (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
        return cls((sh, sw), (ph, pw), (dh, dw))


def output_size(size: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> tuple[int, int]:
    """(height, width) of the output. Raises RuntimeError, in torch's words, for a kernel larger than the image."""
    padded = [size[d] + 2 * geometry.padding[d] for d in (0, 1)]
    reach = [geometry.dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1)]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). "
            f"Kernel size: ({reach[0]} x {reach[1]}). Kernel size can't be greater than actual input size"
        )
    height, width = ((padded[d] - reach[d]) // geometry.stride[d] + 1 for d in (0, 1))
    return height, width
