"""Stopping when asked: SIGTERM, SIGUSR1 and Ctrl-C end a run with a checkpoint, on all ranks at the same place.

A run is a sequence of units of work, a training step or a batch of test images each, numbered alike on every rank. A
thread on each rank talks to the others every INTERVAL seconds, however long a unit takes:

    was anybody asked?            max over ranks   no: sleep again
    which unit has each begun?    max over ranks   all finish that unit, and stop before the next

No rank begins a unit between its answer to the second question and the result, so none goes past it.
"""

import math
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

# Slurm sends SIGUSR1 where a job asks for a warning (--signal), and mpirun passes it on to its ranks.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERVAL = 2.0  # seconds between two questions: little beside the 30 that schedulers grant
# A terminal and a launcher may both pass on one Ctrl-C; a second one from a person comes later than this (seconds).
SAME_KEYPRESS = 1.0
# Of the questions themselves. A rank that is gone ends them at once; one that is slow must not.
PATIENCE = timedelta(days=1)


class StopRequest:
    """Records a signal instead of exiting, as a context that every rank enters. A second Ctrl-C ends the process.

    Signals reach ranks at different times, or one rank alone: `due` is how they stop together. With `save_seconds`
    they also agree, by the clock of rank 0, on when to write a checkpoint.
    """

    def __init__(self, save_seconds: float | None = None):
        self.save_seconds = save_seconds
        self._save_at = math.inf if save_seconds is None else time.monotonic() + save_seconds
        self._save_after: int | None = None
        self.asked_at: float | None = None
        self.agreed = threading.Event()
        self._begun, self._last = -1, None
        self._done = self._failed = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: dict[int, Any] = {}

    def due(self, unit: int) -> bool:
        """Whether to stop instead of beginning this unit of work; called before each, in rising order."""
        if self._thread is None:
            return self.asked_at is not None
        with self._lock:
            if self._last is not None and unit > self._last:
                return True
            self._begun = unit
            return False

    def save_due(self, unit: int) -> bool:
        """Whether to write a checkpoint before beginning this unit of work; called before training steps."""
        if self._thread is None:
            return time.monotonic() >= self._save_at
        with self._lock:
            return self._save_after is not None and unit > self._save_after

    def saved(self, unit: int) -> None:
        """A checkpoint was written before this unit, on every rank; the next one is due in `save_seconds`."""
        with self._lock:
            if self._save_after is not None and unit > self._save_after:
                self._save_after = None
            if self.save_seconds is not None:
                self._save_at = time.monotonic() + self.save_seconds

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {number: signal.signal(number, self._record) for number in SIGNALS}
        if dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            assert isinstance(group, dist.ProcessGroup)  # of all ranks, so of this one
            self._group = group
            self._thread = threading.Thread(target=self._watch, name="twolevel stop", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = kind is not None and not self.agreed.is_set()
        self._done = True
        self._wake.set()
        if self._thread is not None:
            # After a failure the others may never answer.
            self._thread.join((2 if self._failed else 10) * INTERVAL)
            if not self._thread.is_alive():
                dist.destroy_process_group(self._group)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork has no run to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if not dist.is_initialized() or dist.get_rank() == 0:
                name = signal.Signals(number).name
                print(f"{name}: stopping with a checkpoint after this step", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and now - self.asked_at > SAME_KEYPRESS:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        try:
            while not self.agreed.is_set():
                self._wake.wait(INTERVAL)
                asked, running, failed, saving, pending = self._max(
                    self.asked_at is not None,
                    not self._done,
                    self._failed,
                    dist.get_rank() == 0 and time.monotonic() >= self._save_at,
                    self._save_after is not None,
                )
                if failed or not running:
                    return
                if asked or (saving and not pending):
                    with self._lock:
                        (last,) = self._max(self._begun)
                        if asked:
                            self._last = last
                            self.agreed.set()
                        else:
                            self._save_after = last
        except RuntimeError:
            pass  # a rank is gone, which the run itself reports

    def _max(self, *values: int) -> list[int]:
        everyones = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(everyones, dist.ReduceOp.MAX, self._group)
        return everyones.tolist()
