"""Records of a run on disk: JSON lines, a table of epochs, TensorBoard."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EPOCH_COLUMNS = ["epoch", "step", "train_loss", "train_error", "test_loss", "test_error", "test_not_finite"]
EPOCH_COLUMNS += ["test_mirrored_error", "ema_test_error", "ema_test_mirrored_error", "ema_test_not_finite"]
EPOCH_COLUMNS += ["learning_rate", "images_per_second", "seconds"]


class MetricsLog:
    """Writes `metrics.jsonl` (every record), `epochs.csv` (a row an epoch) and `tensorboard/` into a run's folder.

    Going on from step `start`, records of later steps, which are about to be made again, are removed first.
    """

    def __init__(self, output: Path, start: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        output.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read(output) if r["step"] <= start] if start else []
        self.lines = (output / "metrics.jsonl").open("w", buffering=1)
        self.table_file = (output / "epochs.csv").open("w", buffering=1, newline="")
        self.table = csv.DictWriter(self.table_file, EPOCH_COLUMNS, extrasaction="ignore")
        self.table.writeheader()
        self.board = None
        for record in kept:
            self.write(record)
        self.board = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, record: dict[str, Any]) -> None:
        """A record of kind "step" or "epoch"; both have `step`, the number of steps done.

        A number that is not finite becomes null: JSON has no other word for it.
        """
        record = {name: value if _is_json(value) else None for name, value in record.items()}
        self.lines.write(json.dumps(record, allow_nan=False) + "\n")
        if record["kind"] == "epoch":
            self.table.writerow(record)
        if self.board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self.lines.close()
        self.table_file.close()
        if self.board is not None:
            self.board.close()


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read(output: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of a run in their order, all or those of one kind; a half-written last line is left out."""
    path = output / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if kind is None or record["kind"] == kind:
            yield record
