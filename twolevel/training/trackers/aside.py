"""A tracker that is told aside: whatever becomes of it, the run neither ends nor waits for it."""

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

from twolevel import durable
from twolevel.training.trackers.base import Tracked, Tracker

MOST_WAITING = 10_000  # records of a service that does not answer: some megabytes
CLOSE_SECONDS = 10.0  # that a run waits in the end for trackers to take what they were told
MOST_SAID = 200  # characters of a service's own words


class Aside:
    """Tells a tracker of a run in a thread of its own. Once it has failed it is told no more, and a warning says so.

    For a tracker that cannot remove records the run's folder keeps, in NAME.json, its id there and up to which step of
    each kind of record it was told, so that a run that goes on is the same one there, and no step twice in it.
    """

    def __init__(self, tracker: Tracker, output: Path, settings: dict[str, dict[str, Any]]):
        self.tracker, self.output, self.settings = tracker, output, settings
        self._file = output / f"{tracker.name}.json"
        self._id: str | None = None
        self._told: dict[str, int] = {}
        self._calls: Queue[Callable[[], None] | None] = Queue(MOST_WAITING)
        self._failure: Exception | None = None
        self._warned = False
        self._thread = Thread(target=self._work, name=f"twolevel tracker {tracker.name}", daemon=True)

    def begin(self, start: int, told: Mapping[str, int]) -> None:
        """Begin, or go on from step `start`; `told` is the last step of each kind of record before."""
        self._thread.start()
        self._ask(partial(self._begin, start, dict(told)))

    def record(self, record: Mapping[str, Any]) -> None:
        """A record of `metrics.jsonl`: its numbers with a fraction."""
        kind, step = record["kind"], record["step"]
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        values = {f"{kind}/{name}": value for name, value in numbers.items() if math.isfinite(value)}
        self._ask(partial(self._record, kind, step, values))

    def rewind(self, step: int, told: Mapping[str, int]) -> None:
        """The run goes back to `step`; `told` as of `begin`."""
        self._ask(partial(self._rewind, step, dict(told)))

    def end(self, *, whole: bool) -> None:
        """The run has ended; `wait` follows."""
        self._ask(partial(self.tracker.close, whole=whole))
        self._ask(None)

    def wait(self, until: float) -> None:
        """Wait for what it was told, to no later than `until` of the monotonic clock; warns of what is not taken."""
        if self._failure is None:
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():
                self._failure = TimeoutError("it has not taken all records at the end")
        self._warn()

    def _ask(self, call: Callable[[], None] | None) -> None:
        if self._failure is None:
            try:
                self._calls.put_nowait(call)
            except Full:
                self._failure = TimeoutError(f"it is {MOST_WAITING} records behind")
        self._warn()

    def _warn(self) -> None:
        if self._failure is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.tracker.name} is told no more of this run ({_words(self._failure)}); metrics.jsonl has all",
                stacklevel=4,
            )

    # ---- in the thread

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None and self._failure is None:
                call()
        except Exception as error:
            self._failure = error
            with suppress(Exception):
                self.tracker.close(whole=False)

    def _begin(self, start: int, told: dict[str, int]) -> None:
        run = Tracked(self.output, self.settings, start)
        if self.tracker.rewinds:
            self.tracker.begin(run)
            return
        before = self._kept()
        self._id = self.tracker.begin(Tracked(self.output, self.settings, start, before["id"]))
        if before["id"] is not None:
            self._told = _furthest(told, before["told"])
        self._keep()

    def _record(self, kind: str, step: int, values: dict[str, float]) -> None:
        if step > self._told.get(kind, 0):
            self.tracker.record(step, values)

    def _rewind(self, step: int, told: dict[str, int]) -> None:
        if self.tracker.rewinds:
            self.tracker.rewind(step)
            return
        self._told = _furthest(told, self._told)
        self._keep()

    def _kept(self) -> dict[str, Any]:
        """What the run's folder says of it; nothing where that was not written here, so that it begins anew."""
        with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            kept = json.loads(self._file.read_text())
            told = {kind: int(step) for kind, step in dict(kept["told"]).items()}
            if isinstance(kept["id"], str):
                return {"id": kept["id"], "told": told}
        return {"id": None, "told": {}}

    def _keep(self) -> None:
        durable.write_text(self._file, json.dumps({"id": self._id, "told": self._told}) + "\n")


def _furthest(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {kind: max(one.get(kind, 0), other.get(kind, 0)) for kind in {**one, **other}}


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:MOST_SAID]
