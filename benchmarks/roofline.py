"""What a machine can do at best, as it is measured in the run that is compared with it; and that comparison."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks import report

if TYPE_CHECKING:
    from benchmarks.layers import Settings, Shape

# What the roofline is measured by: side of the product; channels and height of the convolution; elements of the
# copy. Far beyond the caches, and enough work to fill the machine.
PROBES = {"cpu": (2048, 512, 16, 1 << 26), "cuda": (8192, 512, 32, 1 << 29)}
# Calls between two readings of the clock: on a GPU so many that the launch of one hides behind another.
REPEATS = {"cpu": 1, "cuda": 20}


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


def measure_shapes(
    names: tuple[str, ...], shapes: Callable[[str], Mapping[Any, int]], peers: Callable[[Any], list[dict]]
) -> list[dict]:
    """Every shape of every network, how often it occurs, and the times of its peers."""
    return [
        {
            "model": name,
            **asdict(shape),
            "label": str(shape),
            "times_in_model": times,
            "peers": peers(shape),
        }
        for name in names
        for shape, times in shapes(name).items()
    ]


def under_roof(seconds: list[float], roof: float) -> dict:
    """The summary of times, with the least time that is possible: in milliseconds, and as a share of the median."""
    timed = report.summary(seconds)
    return timed | {"roof_ms": 1e3 * roof, "of_roof": 1e3 * roof / timed["median_ms"]}


def draw(found: list[dict], series: Callable[[dict], str], path: Path, title: str) -> None:
    """Times by pass, series of a peer and shape; a black line is the roof of that bar."""
    panels, marks = {}, {}
    for shape in found:
        for peer in shape["peers"]:
            for into, value in ((panels, "median_ms"), (marks, "roof_ms")):
                into.setdefault(peer["pass"], {}).setdefault(series(peer), []).append(peer[value])
    labels = [shape["label"].replace(" ", "\n") for shape in found]
    report.bars(panels, labels, path, title=f"{title} (black: roof)", unit="ms", marks=marks)
