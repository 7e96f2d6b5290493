"""Measures this machine for the cost model: the package's own layers, forward and backward, over grids of shapes.

Nothing is assumed of how fast a layer is or how it is computed: `TwoLevelConv2d` and `nn.Conv2d` are timed as they
are, between shapes `Table` interpolates. A layer is timed as it runs in a network: `DEPTH` calls forward, then as
many backward in reverse, so that outputs go to memory that is not in a cache and backward reads what was left there
long ago, while the input has just been written.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twolevel.analysis.planner.machine import Link, Machine, Table
from twolevel.nn import TwoLevelConv2d
from twolevel.ops import Copies

T = TypeVar("T")

DEPTH = 3
TURNS = 2
# Above this many seconds a call, estimated, or elements, a point is not measured but scaled from one with fewer pixels.
LONGEST = 0.04
MOST = 2**23


@dataclass(frozen=True)
class Grid:
    """The shapes that are measured: channels of a group, groups of a rank, ranks; (batch, height) for pixels."""

    widths: tuple[int, ...]
    groups: tuple[int, ...]
    ranks: tuple[int, ...]
    images: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]
    elements: tuple[int, ...]
    most_channels: int = 512
    """of a rank; layers with more groups than make them are scaled from those with fewer"""


CPU_GRID = Grid(
    widths=(2, 4, 8, 12, 16, 24, 32, 64, 128),
    groups=(1, 2, 4, 16),  # libraries take other ways for one group than for two
    ranks=(1, 8),
    images=((16, 8), (32, 16), (64, 32)),
    channels=(4, 16, 64, 256),
    elements=tuple(2**e for e in (12, 15, 18, 20, 22)),
)
GPU_GRID = Grid(
    widths=(8, 16, 40, 80, 160, 320, 640, 1280),
    groups=(1, 2, 16),
    ranks=(1, 8),
    images=((64, 8), (128, 16), (128, 32)),
    channels=(16, 160, 1280),
    elements=tuple(2**e for e in (14, 17, 20, 23, 26)),
    most_channels=2560,
)


class Stopwatch:
    """Seconds of a call: of one thread on a CPU those that it had a core, on a GPU those between two events."""

    def __init__(self, device: str):
        self.device = device
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, call: Callable[[], T]) -> tuple[float, T]:
        if self.device == "cpu":
            start = self.clock()
            result = call()
            return self.clock() - start, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result


class Calibration:
    """The measurements of one device in one precision; `run` measures `num_tables` tables."""

    num_tables = 10

    def __init__(self, device: str, precision: str, grid: Grid | None = None, depth: int | None = None):
        self.device, self.precision, self.depth = device, precision, depth or DEPTH
        self.grid = grid or (CPU_GRID if device == "cpu" else GPU_GRID)
        self.watch = Stopwatch(device)

    def run(self) -> Iterator[tuple[str, Table]]:
        """Each table with its name, as it is measured."""
        torch.ones(31 << 18)  # make the C library keep freed memory, as it does after any large network
        for kind, (kernel, taps) in product(("conv", "two-level"), (("spatial", 9), ("pointwise", 1))):
            yield f"{kind} {kernel}", self._convolutions(kind, taps)
        for kind in ("norm", "activation", "add", "mean"):
            yield kind, self._elementwise(kind)
        yield "linear", self._linear()
        yield "optimiser", self._optimiser()

    # ---- one layer

    def seconds(
        self, layer: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]
    ) -> tuple[float, float]:
        """(forward, backward) medians of a layer on inputs like x, `depth` of them in flight."""
        forward: list[tuple[int, float]] = []
        backward: list[tuple[int, float]] = []
        for turn in range(TURNS + 1):
            done: list[tuple[Tensor, Tensor]] = []
            for _ in range(self.depth if turn else 1):
                given = x.clone().requires_grad_()
                with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                    seconds, y = self.watch(lambda given=given: layer(given))
                forward.append((turn, seconds))
                done.append((given, y))
            gradient = torch.full_like(done[0][1], 1e-3)
            while done:
                given, y = done.pop()
                hot = gradient.clone()
                wanted = [given, *parameters]
                seconds, _ = self.watch(
                    lambda y=y, wanted=wanted, hot=hot: torch.autograd.grad(y, wanted, hot)
                )
                backward.append((turn, seconds))
        # The first turn warms up.
        return (
            statistics.median(s for turn, s in forward if turn),
            statistics.median(s for turn, s in backward if turn),
        )

    def _images(self, batch: int, channels: int, height: int, width: int | None = None) -> Tensor:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        x = torch.randn(batch, channels, height, width or height, device=self.device, dtype=dtype)
        return x.to(memory_format=torch.channels_last)

    # ---- tables

    def _convolutions(self, kind: str, taps: int) -> Table:
        grid, widths, images = self.grid, self.grid.widths, self.grid.images
        if taps == 1 and len(widths) > 3 and len(images) > 2:
            widths, images = widths[::2], images[::2]  # the few shortcuts: every other shape will do
        pixels = [batch * height * height for batch, height in images]
        axes: list[tuple[str, Sequence[float]]] = [("width", widths), ("groups", grid.groups)]
        axes += [("ranks", grid.ranks)] if kind == "two-level" else []
        axes += [("pixels", pixels)]
        times: list[tuple[float, float]] = []
        rate = {"cpu": 1e11, "cuda": 2e13}[self.device]
        all_ranks = grid.ranks if kind == "two-level" else (1,)
        for width, groups, ranks in product(widths, grid.groups, all_ranks):
            for index, (batch, height) in enumerate(images):
                if width * groups > grid.most_channels and groups > grid.groups[0]:
                    more = groups / grid.groups[grid.groups.index(groups) - 1]
                    times.append(_scaled(times[-len(all_ranks) * len(images)], more))  # fewer groups
                    continue
                elements = width * groups * batch * height * height
                if index and (3 * taps * width * elements / rate > LONGEST or elements > MOST):
                    more = pixels[index] / pixels[index - 1]
                    times.append(_scaled(times[-1], more))
                    continue
                layer = _layer(kind, width, groups, ranks, 3 if taps == 9 else 1).to(self.device)
                layer = layer.to(memory_format=torch.channels_last)
                x = self._images(batch, width * groups, height)
                times.append(self.seconds(layer, x, list(layer.parameters())))
        return _table(axes, times)

    def _elementwise(self, kind: str) -> Table:
        grid = self.grid
        times: list[tuple[float, float]] = []
        for channels, elements in product(grid.channels, grid.elements):
            pixels = max(1, elements // channels)
            x = self._images(1, channels, pixels, 1)
            if kind == "norm":
                norm = nn.BatchNorm2d(channels).to(self.device)
                times.append(self.seconds(norm, x, list(norm.parameters())))
            elif kind == "activation":
                times.append(self.seconds(F.relu, x, []))
            elif kind == "mean":
                times.append(self.seconds(lambda t: t.mean((2, 3)), x, []))
            else:
                other = torch.randn_like(x)
                forward, _ = self.seconds(lambda t, other=other: t + other, x, [])
                times.append((forward, forward))
        return _table([("channels", grid.channels), ("elements", grid.elements)], times)

    def _linear(self) -> Table:
        points: list[tuple[int, tuple[float, float]]] = []
        for features, batch in product((256, 4096), (16, 128)):
            layer = nn.Linear(features, 10).to(self.device)
            labels = torch.zeros(batch, dtype=torch.long, device=self.device)
            x = torch.randn(batch, features, device=self.device)
            seconds = self.seconds(
                lambda t, layer=layer, labels=labels: F.cross_entropy(layer(t), labels),
                x,
                list(layer.parameters()),
            )
            points.append((features * 10 * batch, seconds))
        points.sort()
        return _table(
            [("elements", [elements for elements, _ in points])], [seconds for _, seconds in points]
        )

    def _optimiser(self) -> Table:
        """Seconds a tensor of a step of fused SGD."""
        sizes, num_tensors = (2**6, 2**10, 2**14, 2**18, 2**21), 10
        times: list[tuple[float, float]] = []
        for size in sizes:
            parameters = [nn.Parameter(torch.randn(size, device=self.device)) for _ in range(num_tensors)]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            sgd = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
            _, *steps = [self.watch(sgd.step)[0] / num_tensors for _ in range(5)]
            seconds = statistics.median(steps)
            times.append((seconds, seconds))
        return _table([("elements", sizes)], times)


def _scaled(times: tuple[float, float], factor: float) -> tuple[float, float]:
    forward, backward = times
    return forward * factor, backward * factor


def _table(axes: Sequence[tuple[str, Sequence[float]]], times: Sequence[tuple[float, float]]) -> Table:
    """The table of these (forward, backward) seconds, in row order."""
    points = tuple((name, tuple(map(float, values))) for name, values in axes)
    return Table(points, tuple(forward for forward, _ in times), tuple(backward for _, backward in times))


def _layer(kind: str, width: int, groups: int, ranks: int, kernel: int) -> nn.Module:
    """A convolution of `groups` groups of `width` channels; a two-level one holds them of groups x ranks."""
    padding = kernel // 2
    if kind == "conv":
        return nn.Conv2d(width * groups, width * groups, kernel, padding=padding, groups=groups, bias=False)
    all_groups, channels = groups * ranks, width * groups
    conv = TwoLevelConv2d(width * all_groups, width * all_groups, kernel, padding=padding, groups=all_groups)
    if ranks > 1:
        for part, rows in ((conv.local, channels), (conv.restriction, groups), (conv.coarse, channels)):
            part.weight = nn.Parameter(part.weight.detach()[:rows].clone())
            part.out_channels = rows
        for part in (conv.local, conv.restriction):
            part.in_channels, part.groups = channels, groups
        conv.exchange = Copies(ranks)  # what a rank computes, without communication
    for part in (conv.local, conv.restriction, conv.coarse):
        nn.init.normal_(part.weight, std=prod(part.weight.shape[1:]) ** -0.5)
    return conv


def machine_name(device: str) -> str:
    """The name of the GPU, or of the processor with the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} {torch.get_num_threads()} thread(s)"


def measured(tables: dict[str, Table], device: str, precision: str, link: Link, internode: Link) -> Machine:
    """The machine of these tables."""
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    return Machine(
        name=machine_name(device),
        source="measured by twolevel plan --calibrate",
        memory=memory,
        flops={},
        bandwidth=0.0,
        link=link,
        internode=internode,
        tables=tables,
        precision=precision,
    )
