"""Records of a run on disk, as JSON lines and a table of epochs, and for whatever shows them elsewhere."""

import csv
import io
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twolevel import durable
from twolevel.training.trackers.aside import CLOSE_SECONDS, Aside

LINES, TABLE = "metrics.jsonl", "epochs.csv"
EPOCH_COLUMNS = ["epoch", "step", "train_loss", "train_error", "test_loss", "test_error", "test_not_finite"]
EPOCH_COLUMNS += ["test_mirrored_error", "ema_test_error", "ema_test_mirrored_error", "ema_test_not_finite"]
EPOCH_COLUMNS += [
    "learning_rate",
    "images_per_second",
    "seconds",
    "memory_mb",
    "utilisation",
    "exchange_exposed",
]


class MetricsLog:
    """Writes `metrics.jsonl` (every record) and `epochs.csv` (a row an epoch) into a run's folder; tells `trackers`.

    Going on from step `start`, records of later steps, which are about to be made again, are removed first. A disk
    that takes no more does not end the run: what is missing of the files is added when there is room.
    """

    def __init__(self, output: Path, start: int = 0, trackers: Sequence[Aside] = ()):
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.trackers = output, trackers
        told = self._begin(start)
        for tracker in trackers:
            tracker.begin(start, told)

    def _begin(self, start: int) -> dict[str, int]:
        """Open the files; returns the last step of each kind of record that they held."""
        before = [record for record in read(self.output) if isinstance(record.get("step"), int)]
        kept = [record for record in before if record["step"] <= start] if start else []
        self.lines = durable.Appended(self.output / LINES, "".join(map(_line, kept)))
        self.table = durable.Appended(self.output / TABLE, _table(kept, header=True))
        return {record["kind"]: record["step"] for record in before}

    def rewind(self, start: int) -> None:
        """Remove the records of later steps than `start`, from which the run goes on."""
        self._end()
        told = self._begin(start)
        for tracker in self.trackers:
            tracker.rewind(start, told)

    def write(self, record: dict[str, Any]) -> None:
        """A record of kind "step" or "epoch"; both have `step`, the number of steps done.

        A number that is not finite becomes null: JSON has no other word for it.
        """
        record = {name: value if _is_json(value) else None for name, value in record.items()}
        self.lines.add(_line(record))
        self.table.add(_table([record]))
        for tracker in self.trackers:
            tracker.record(record)

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        self.lines.sync()
        self.table.sync()

    def close(self, *, whole: bool = True) -> None:
        """The run has ended; `whole` unless it was stopped or failed."""
        self._end()
        until = time.monotonic() + CLOSE_SECONDS
        for tracker in self.trackers:
            tracker.end(whole=whole)
        for tracker in self.trackers:
            tracker.wait(until)

    def _end(self) -> None:
        self.lines.close()
        self.table.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _table(records: Iterable[dict[str, Any]], *, header: bool = False) -> str:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, EPOCH_COLUMNS, extrasaction="ignore")
    if header:
        table.writeheader()
    table.writerows(record for record in records if record["kind"] == "epoch")
    return text.getvalue()


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read(output: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of a run in their order, all or those of one kind; a half-written last line is left out."""
    path = output / LINES
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        record = parse(line)
        if record is not None and (kind is None or record["kind"] == kind):
            yield record


def parse(line: str) -> dict[str, Any] | None:
    """The record in a line; None where it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "kind" in record else None
