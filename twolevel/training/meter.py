"""What a run makes of its machine: memory, the share of its rate that is used, how long ranks wait for each other."""

from typing import Any

import torch

from twolevel.analysis.count import count, countable
from twolevel.analysis.rate import product_rate
from twolevel.distributed.agreement import all_gather, together
from twolevel.distributed.collectives import axes_of
from twolevel.distributed.strategies import Placed
from twolevel.errors import UserError
from twolevel.host import process_memory

PASSES = 3  # forward, and the gradients of inputs and of weights, each as many multiply-accumulates


class Meter:
    """Measures this rank between records of steps; one of an epoch is of all ranks.

    A number that is not known is None:

    - `memory_mb`, 10^6 bytes: on a GPU the most that tensors took since the last record; on a CPU the most that the
      process has had so far. Of an epoch the largest of all ranks.
    - `utilisation`: operations of the network, whatever a layer's form computes, over those that all ranks could do in
      that time, by the rate of their matrix products; the field's MFU. Not for networks that cannot be counted.
    - `exchange_exposed`: the share of the time in which the layers of a rank wait for other ranks. Of an epoch the mean
      over ranks. None on GPUs, where not the host waits but the stream, and where layers exchange nothing: replicas,
      fsdp and pipelines wait in torch.
    """

    def __init__(self, placed: Placed, operations: float | None, rate: float | None):
        """`operations` of a training step for each image; `rate` a second of all ranks."""
        self.device, self.operations, self.rate = placed.device, operations, rate
        self.axes = [axis for axis in axes_of(placed.model) if axis.ranks > 1]
        if self.device.type == "cuda":
            self.axes = []
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.memory: float | None = None
        self.waited = self.seconds = 0.0

    def begin(self) -> None:
        """What is measured begins now."""
        self.before = self._waited()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def steps(self, images: float, seconds: float) -> dict[str, float | None]:
        """What a record says of the steps since `begin`, which took so long for so many images of all ranks."""
        waited, memory = self._waited() - self.before, self._memory()
        self.waited += waited
        self.seconds += seconds
        self.memory = memory if self.memory is None else max(self.memory, memory or 0.0)
        self.begin()
        return {
            "memory_mb": memory,
            "utilisation": self.utilisation(images, seconds),
            "exchange_exposed": waited / seconds if self.axes else None,
        }

    def epoch(self, images: float, seconds: float) -> dict[str, float | None]:
        """What a record says of an epoch; every rank must call this. Of one that went on, its last part is measured."""
        exposed = self.waited / self.seconds if self.axes and self.seconds else None
        ranks = all_gather([self.memory, exposed], self.device)
        self._begin_epoch()
        memories, shares = (
            [value for value in values if value is not None] for values in zip(*ranks, strict=True)
        )
        return {
            "memory_mb": max(memories, default=None),
            "utilisation": self.utilisation(images, seconds),
            "exchange_exposed": sum(shares) / len(shares) if shares else None,
        }

    def utilisation(self, images: float, seconds: float) -> float | None:
        if self.operations is None or self.rate is None:
            return None
        return self.operations * images / (seconds * self.rate)

    def _waited(self) -> float:
        return sum(axis.waited for axis in self.axes)

    def _memory(self) -> float | None:
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else process_memory("VmHWM")
        return None if peak is None else peak / 1e6


def make_meter(
    placed: Placed, options: dict[str, Any], image_shape: tuple[int, int, int], *, first: bool
) -> Meter:
    """The meter of this rank for the network of `models.create(**options)`; every rank must call this.

    It takes a fraction of a second, and a place among random numbers: seed them afterwards.
    """
    operations = None
    with together(placed.device):
        if first:
            operations = training_operations(options, image_shape)
    all_gather(None, placed.device)  # ranks of a machine share it: they measure at the same time
    rates = all_gather(_rate(placed), placed.device)
    rate = None if None in rates else sum(rates)
    return Meter(placed, operations, rate)


def training_operations(options: dict[str, Any], image_shape: tuple[int, int, int]) -> float | None:
    """Operations of a training step for each image, two a multiply-accumulate; None where they cannot be counted."""
    try:
        return 2.0 * PASSES * count(countable(**options), image_shape, ranks=1).macs
    except UserError:
        return None


def _rate(placed: Placed) -> float | None:
    precision = placed.strategy.precision
    try:
        return product_rate(placed.device, torch.bfloat16 if precision == "bf16" else placed.strategy.dtype)
    except RuntimeError:  # of torch: no memory, or no product of such numbers
        return None
