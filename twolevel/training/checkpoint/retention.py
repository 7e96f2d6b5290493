"""Which checkpoints of a run are kept."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twolevel.errors import UserError
from twolevel.training.checkpoint.folders import complete, read_state


@dataclass(frozen=True)
class Retention:
    """The `newest` so many; with `best` the one of least test error; the one of every epoch that `epochs` divides."""

    newest: int = 2
    best: bool = True
    epochs: int | None = None

    def prune(self, root: Path, step: int) -> None:
        """Remove what is not to be kept of the checkpoints of earlier steps than `step`, which is the newest."""
        paths = {number: path for number, path in complete(root).items() if number <= step}
        found = {number: _about(path) for number, path in paths.items()}
        kept = {*sorted(found)[-self.newest :], step}
        tested = {
            number: about["test_error"]
            for number, about in found.items()
            if about.get("test_error") is not None
        }
        if self.best and tested:
            kept.add(min(tested, key=lambda number: (tested[number], number)))
        if self.epochs is not None:
            kept |= {
                n for n, about in found.items() if _ends_epoch(about) and about["epoch"] % self.epochs == 0
            }
        for number in found.keys() - kept:
            shutil.rmtree(paths[number], ignore_errors=True)


def _about(path: Path) -> dict[str, Any]:
    try:
        return read_state(path)
    except UserError:
        return {}


def _ends_epoch(about: dict[str, Any]) -> bool:
    return about.get("position") == 0 and about.get("untested") is None and about.get("epoch", 0) > 0
