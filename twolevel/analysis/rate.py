"""What a machine can do at best: the rate of products of square matrices, measured in a fraction of a second."""

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from twolevel.ops.clock import gpu_seconds
from twolevel.streams import stream

SIDES = 256, 4096  # of the matrices, the smallest and the largest
FILLS = 2e-3  # seconds of a product that fills a machine, whatever it takes to begin one
WINDOWS = 5  # of which the best counts: others of the machine may take their share of some
WINDOW_SECONDS = 0.03


@torch.no_grad()
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of this process, two a multiply-accumulate, with the threads that it has.

    On a GPU a product is a 1 x 1 convolution, for which cuDNN may take the same units (TF32) as for others.
    """
    side, call, seconds = SIDES[0], None, 0.0
    while call is None or (seconds < FILLS and side < SIDES[1]):
        side = side if call is None else 2 * side
        call = _product(side, device, dtype)
        _seconds(call, 1, device)  # what is slow once: memory, the choice of an algorithm
        seconds = min(_seconds(call, 1, device) for _ in range(2))
    number = max(1, round(WINDOW_SECONDS / seconds))
    return 2.0 * side**3 * number / min(_seconds(call, number, device) for _ in range(WINDOWS))


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    # Noise, since a card multiplies zeros and ones faster: they take less power.
    noise = torch.rand(2, side, side, generator=stream("rate")) - 0.5
    left, right = noise.to(device, dtype)
    if device.type == "cuda":
        images, weight = left.view(1, side, 1, side), right.view(side, side, 1, 1)
        images = images.to(memory_format=torch.channels_last)
        return lambda: F.conv2d(images, weight)
    result = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=result)


def _seconds(call: Callable[[], object], number: int, device: torch.device) -> float:
    if device.type == "cuda":
        return number * gpu_seconds(call, number)
    began = time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - began
