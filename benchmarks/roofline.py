"""What a machine can do at best, as it is measured in the run that is compared with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks import report

if TYPE_CHECKING:
    from benchmarks.layers import Settings, Shape

# What the roofline is measured by: side of the product; channels and height of the convolution; elements of the
# copy. Far beyond the caches, and enough work to fill the machine.
PROBES = {"cpu": (2048, 512, 16, 1 << 26), "cuda": (8192, 512, 32, 1 << 29)}


@dataclass(frozen=True)
class Roofline:
    """What this machine was measured to do at best; some CPUs' convolutions outrun their matrix products."""

    product_operations_per_second: float
    convolution_operations_per_second: float
    bytes_per_second: float

    def seconds(self, shape: "Shape", weights: int, settings: "Settings") -> float:
        """The least time of any one pass: all three have the same operations and touch tensors of the same sizes.

        `weights` is their number. Representatives count as operations, not as bytes: they could stay on the chip.
        """
        pixels = settings.batch * shape.output_height**2
        operations = 2 * pixels * weights
        elements = settings.batch * shape.height**2 * shape.channels + pixels * shape.outputs + weights
        rate = max(self.product_operations_per_second, self.convolution_operations_per_second)
        return max(operations / rate, elements * settings.dtype.itemsize / self.bytes_per_second)


@torch.no_grad()
def measure_roofline(settings: "Settings", seconds: Callable[..., float]) -> Roofline:
    """Rates of a large product, a large dense convolution and a large copy (bytes read and written)."""
    side, channels, height, elements = PROBES[settings.device]
    options = {"device": settings.device, "dtype": settings.dtype}
    # Noise, since a card multiplies zeros and ones faster: they take less power.
    left, right, product = (torch.randn(side, side, **options) for _ in range(3))
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    convolution = convolution.to(**options, memory_format=torch.channels_last)
    x = torch.randn(32, channels, height, height, **options).to(memory_format=torch.channels_last)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(seconds(call) for _ in range(5))

    return Roofline(
        2 * side**3 / best(lambda: torch.mm(left, right, out=product)),
        2 * len(x) * height**2 * convolution.weight.numel() / best(lambda: convolution(x)),
        report.copy_rate(settings.device, settings.dtype, elements, seconds),
    )
