"""Ranks beyond the mesh: they join no process group, and wait until the run of the others has ended.

They meet rank 0 through its store as all ranks do, so that nobody waits for them; at the next change of the number of
ranks they may work. A spare that is asked to stop leaves at once. SIGUSR1 is for the run, which a spare outlasts.
"""

import contextlib
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import NoReturn

# torch.distributed documents it, and its type hints leave it out.
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from twolevel.errors import SpareEnded, Stopped

LOOK_S = 0.5  # between two looks at the store; nothing waits for a spare
PATIENCE = timedelta(seconds=10)  # of rank 0, which may hold the store, for spares to have seen the end
ENDED, LEFT, ALL_LEFT = "the run has ended", "spares that left", "all spares have left"


@dataclass(frozen=True)
class Spares:
    """The spares of a run, which rank 0 alone has; `store` is what they watch."""

    store: Store
    number: int

    def release(self) -> None:
        """Tell the spares that the run has ended, and wait for them a little; one that is gone holds up nothing."""
        with contextlib.suppress(RuntimeError):
            self.store.set(ENDED, "")
            self.store.wait([ALL_LEFT], PATIENCE)


def wait_for_the_end(store: Store, number: int) -> NoReturn:
    """Wait as one of `number` spares until rank 0 releases them.

    Raises:
        SpareEnded: the run has ended.
        Stopped: this rank was asked to stop, by SIGTERM or Ctrl-C.
        RuntimeError: rank 0 is gone, and its store with it.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may
        handlers = {signal.SIGTERM: _leave, signal.SIGINT: _leave, signal.SIGUSR1: signal.SIG_IGN}
        before = {which: signal.signal(which, handler) for which, handler in handlers.items()}
    try:
        while not _seen(store):
            time.sleep(LOOK_S)
        raise SpareEnded("the run has ended, without this spare")
    except (SpareEnded, Stopped):
        with contextlib.suppress(RuntimeError):
            if store.add(LEFT, 1) == number:
                store.set(ALL_LEFT, "")
        raise
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _seen(store: Store) -> bool:
    try:
        return store.check([ENDED])
    except RuntimeError as error:
        raise RuntimeError("the store of rank 0 was closed by peer") from error


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped(f"{signal.Signals(number).name}: a spare has nothing to save")
