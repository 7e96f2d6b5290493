"""What every tracker is."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twolevel.errors import UserError

PROJECT = "twolevel"
"""Where a service shows runs unless its own environment variable says otherwise."""


@dataclass(frozen=True)
class Tracked:
    """The run that a tracker is to show, from step `start` on."""

    output: Path
    settings: dict[str, dict[str, Any]]
    """By section, as in config.json."""
    start: int = 0
    id: str | None = None
    """What the tracker called it when it began; None for a run that the tracker has not shown before."""

    @property
    def name(self) -> str:
        return self.output.absolute().name

    def flat(self) -> dict[str, Any]:
        """Every setting by its own name."""
        return {name: value for section in self.settings.values() for name, value in section.items()}


class Tracker(Protocol):
    """Shows one run. Its methods may raise anything and take any time; one thread calls them, in this order."""

    name: str
    rewinds: bool
    """Whether it can remove records. One that cannot is not told again of steps that it was told of."""

    def begin(self, run: Tracked) -> str | None:
        """Begin to show a run, or go on with it; returns its id in the service, None where it needs none.

        One that `rewinds` removes the records of later steps than the run's start.
        """
        ...

    def record(self, step: int, values: dict[str, float]) -> None:
        """Show finite numbers by name, "step/loss", at a number of steps done."""
        ...

    def rewind(self, step: int) -> None:
        """Remove the records of later steps. Called only where it `rewinds`."""
        ...

    def close(self, *, whole: bool) -> None:
        """The run has ended; `whole` unless it was stopped or failed."""
        ...


def package(name: str) -> Any:
    """The package of a tracker, an extra of this one. Raises UserError where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # one that is too old for another fails in its own ways
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"trackers={name} needs {name} ({why}); pip install twolevel[{name}], or leave it out of --trackers"
        ) from error
