"""Time on a GPU, which works on while the host goes ahead."""

import time
from collections.abc import Callable
from itertools import pairwise

import torch


def gpu_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one of `repeats` calls that follow each other, between two events of the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


class Marks:
    """Moments, and the seconds between them: of the current stream on a GPU, which is not waited for, or the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self._events: list[torch.cuda.Event] = []
        self._moments: list[float] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each moment to the next; waits for the last one."""
        if self._events:
            self._events[-1].synchronize()
            return [first.elapsed_time(then) / 1e3 for first, then in pairwise(self._events)]
        return [then - first for first, then in pairwise(self._moments)]
