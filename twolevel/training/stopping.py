"""Stopping when asked: SIGTERM, as schedulers send it before they kill, and Ctrl-C."""

import signal
import sys
import threading
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes a signal instead of dying of it, as a context. A second Ctrl-C ends the process as ever.

    Ranks are not asked at the same step, nor all of them: `agreed` is how they stop together.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.asked = False
        self.before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        if not self.asked and (not dist.is_initialized() or dist.get_rank() == 0):
            name = signal.Signals(number).name
            print(f"{name}: stopping with a checkpoint at the next log step", file=sys.stderr, flush=True)
        self.asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; a collective where there are several."""
        if dist.get_world_size() == 1:
            return self.asked
        asked = torch.tensor(float(self.asked), device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked)
