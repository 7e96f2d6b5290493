"""Records of a run on disk: JSON lines, a table of epochs, TensorBoard."""

import csv
import io
import json
import math
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from twolevel import durable

LINES, TABLE = "metrics.jsonl", "epochs.csv"
EPOCH_COLUMNS = ["epoch", "step", "train_loss", "train_error", "test_loss", "test_error", "test_not_finite"]
EPOCH_COLUMNS += ["test_mirrored_error", "ema_test_error", "ema_test_mirrored_error", "ema_test_not_finite"]
EPOCH_COLUMNS += ["learning_rate", "images_per_second", "seconds"]


class MetricsLog:
    """Writes `metrics.jsonl` (every record), `epochs.csv` (a row an epoch) and `tensorboard/` into a run's folder.

    Going on from step `start`, records of later steps, which are about to be made again, are removed first. A disk
    that takes no more does not end the run: what is missing of the first two files is added when there is room.
    """

    def __init__(self, output: Path, start: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        output.mkdir(parents=True, exist_ok=True)
        self.output, self.writer = output, SummaryWriter
        self._hook, threading.excepthook = threading.excepthook, self._in_thread
        self._begin(start)

    def _begin(self, start: int) -> None:
        kept = [r for r in read(self.output) if r["step"] <= start] if start else []
        self.lines = durable.Appended(self.output / LINES, "".join(map(_line, kept)))
        self.table = durable.Appended(self.output / TABLE, _table(kept, header=True))
        purge = start + 1 if start else None
        self.board = self.writer(str(self.output / "tensorboard"), purge_step=purge)

    def rewind(self, start: int) -> None:
        """Remove the records of later steps than `start`, from which the run goes on."""
        self._end()
        self._begin(start)

    def write(self, record: dict[str, Any]) -> None:
        """A record of kind "step" or "epoch"; both have `step`, the number of steps done.

        A number that is not finite becomes null: JSON has no other word for it.
        """
        record = {name: value if _is_json(value) else None for name, value in record.items()}
        self.lines.add(_line(record))
        self.table.add(_table([record]))
        self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        try:
            for name, value in record.items():
                if isinstance(value, float) and self.board is not None:
                    self.board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        except OSError as error:
            warnings.warn(f"tensorboard/ is not written any more: {error.strerror}", stacklevel=3)
            self.board = None

    def _in_thread(self, failure: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's thread where a disk fails: `_show` is told, and warns."""
        of_board = type(failure.thread).__module__.startswith("tensorboard")
        if not (of_board and issubclass(failure.exc_type, OSError)):
            self._hook(failure)

    def sync(self) -> None:
        """Wait until the records are on the disk."""
        self.lines.sync()
        self.table.sync()

    def close(self) -> None:
        try:
            self._end()
        finally:
            threading.excepthook = self._hook

    def _end(self) -> None:
        self.lines.close()
        self.table.close()
        if self.board is not None:
            try:
                self.board.close()
            except OSError as error:
                warnings.warn(f"tensorboard/ is not whole: {error.strerror}", stacklevel=2)


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
