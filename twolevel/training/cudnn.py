"""cuDNN's choice of algorithms in a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def autotuned(device: torch.device) -> Iterator[None]:
    """In it cuDNN times its algorithms once for each size of convolution on a GPU: all batches of a run have one.

    Not where the process asks for deterministic algorithms, since what is timed differs from run to run. The
    process's own setting is back afterwards.
    """
    settings = torch.backends.cudnn
    if device.type != "cuda" or settings.deterministic or torch.are_deterministic_algorithms_enabled():
        yield
        return
    before, settings.benchmark = settings.benchmark, True
    try:
        yield
    finally:
        settings.benchmark = before
