"""Time on a GPU, which works on while the host goes ahead."""

from collections.abc import Callable

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
