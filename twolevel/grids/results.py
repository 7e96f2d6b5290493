"""The JSON lines of finished runs: what is published of a grid, and what says that a run need not be repeated."""

import json
import os
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from twolevel.errors import UserError
from twolevel.grids.declare import Run, completed
from twolevel.host import processor
from twolevel.training.config import TrainConfig
from twolevel.training.validation import is_number

KEYS = {"grid", "run", "settings", "completed", "final", "curve", "seconds", "counts", "machine", "torch"}
# Of an epoch's record, what curves are drawn of.
CURVE = ("epoch", "train_loss", "train_error", "test_loss", "test_error", "ema_test_error", "seconds")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of finished runs in `path`; none where there is no file. Raises UserError for a damaged line."""
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            lines.append({})
        if not _is_result(lines[-1]):
            raise UserError(f"{path}, line {number} is not that of a finished run; remove it")
    return lines


def _is_result(line: Any) -> bool:
    """Whether it is what `line_of` makes, or made in an earlier version."""
    if not isinstance(line, dict) or not line.keys() >= KEYS:
        return False
    parts = [line[name] for name in ("settings", "completed", "final", "counts", "machine")]
    curve = line["curve"]
    if not isinstance(curve, list) or not all(isinstance(part, dict) for part in (*parts, *curve)):
        return False
    completed, final, counts = line["completed"], line["final"], line["counts"]
    numbers = [final.get("test_error"), final.get("test_mirrored_error", 0), line["seconds"]]
    numbers += [counts.get("parameters"), counts.get("macs")]
    numbers += [epoch.get(name) for epoch in curve for name in ("epoch", "train_loss")]
    texts = [line["grid"], line["run"], line["torch"], line["machine"].get("cpu")]
    texts += [line["machine"].get("gpu") or ""]
    if not all(map(is_number, numbers)) or not all(isinstance(text, str) for text in texts):
        return False
    try:
        Run({name: completed[name] for name in _defaults().keys() & completed.keys()}).config()
    except UserError:
        return False
    return not _NAMES - completed.keys()


# Of `completed`, what a page asks of every line.
_NAMES = {"model", "data", "conv", "groups", "recipe", "epochs", "seed", "data_parallel", "group_parallel"}


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line as a whole, also where other grids add theirs. Raises UserError where the disk takes part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        # After part of a line this one is to stand alone.
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        text = ("\n" * torn + json.dumps(line) + "\n").encode()
        written = os.write(descriptor, text)
    finally:
        os.close(descriptor)
    if written < len(text):
        raise UserError(
            f"{path} took {written} of {len(text)} bytes of a result: is the disk full? The run is kept"
        )


def is_of(line: dict[str, Any], run: Run) -> bool:
    """Whether a line is of a run with the same settings, on as many ranks, whichever grid declared it.

    A setting that is newer than the line had its default then.
    """
    theirs = line["completed"]
    return all(theirs.get(name, _defaults()[name]) == value for name, value in run.completed.items())


def find(lines: list[dict[str, Any]], run: Run) -> dict[str, Any] | None:
    """The line that is of a run; None where there is none."""
    return next((line for line in lines if is_of(line, run)), None)


@cache
def _defaults() -> dict[str, Any]:
    return completed(TrainConfig())


def line_of(grid: str, run: Run, folder: Path) -> dict[str, Any]:
    """The line of a run that has finished in `folder`.

    It holds no path and nothing else of the settings that leave results as they are.
    """
    import torch

    from twolevel.analysis import count
    from twolevel.analysis.count import countable
    from twolevel.training import metrics

    config = TrainConfig.from_dict(json.loads((folder / "config.json").read_text()), str(folder))
    epochs = list(metrics.read(folder, "epoch"))
    model = countable(**config.model.create_options(config.data.num_classes))
    return {
        "grid": grid,
        "run": run.name,
        "settings": run.settings,
        "completed": completed(config),
        "final": {name: value for name, value in epochs[-1].items() if name != "kind"},
        "curve": [{name: epoch[name] for name in CURVE if name in epoch} for epoch in epochs],
        "seconds": sum(epoch["seconds"] for epoch in epochs),
        "counts": count(model, config.data.image_shape).sums(),
        "machine": {
            "cpu": processor(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
