"""What a person sees of a grid: a line for each run that ends, and how long all of it will take."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from twolevel.grids import results
from twolevel.grids.declare import Grid
from twolevel.terminal import Console

LINE_SECONDS = 300.0  # between two lines where there is no terminal


class Progress:
    """Shows a grid at work. `fractions` says how much of each run at work is done."""

    def __init__(self, grid: Grid, lines: Path, fractions: Callable[[], dict[str, float]]):
        self.grid, self.lines, self.fractions = grid, lines, fractions
        self.console = Console(file=sys.stdout)
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        ]
        self.bars = Bars(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bars.add_task(grid.name, total=len(grid.runs), left="")
        self.began = self.last_line = self.last_look = time.monotonic()
        self.start = 0.0

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text)

    def begin(self, finished: int) -> None:
        """`finished` runs have a line already."""
        self.start = finished + sum(self.fractions().values())
        about = f": {self.grid.about}" if self.grid.about else ""
        had = f", {finished} of them finished before" if finished else ""
        self.say(f"{self.grid.name}{about}; {len(self.grid.runs)} runs{had}")

    def finished(self, line: dict[str, Any]) -> None:
        """A run has ended, of which this is the line."""
        final = line["final"]
        self.say(
            f"{line['run']}  test error {final['test_error']:.2f} %  train loss {final['train_loss']:.3f}  "
            f"{line['seconds'] / 60:.1f} min  {self.left()}"
        )
        self.last_line = time.monotonic()

    def look(self) -> None:
        """Bring what is shown up to date."""
        now = time.monotonic()
        if now - self.last_look < 5:
            return
        self.last_look = now
        self.bars.update(self.task, completed=int(self.complete()), left=self.left())
        if self.bars.disable and now - self.last_line > LINE_SECONDS:
            self.last_line = now
            self.say(f"{self.grid.name}: {self.complete():.1f} of {len(self.grid.runs)} runs  {self.left()}")

    def complete(self) -> float:
        """Runs that are finished, and parts of those at work."""
        lines = results.read(self.lines)
        have = [run for run in self.grid.runs if results.find(lines, run)]
        return len(have) + sum(self.fractions().values())

    def left(self) -> str:
        """About how long the rest takes, at the pace so far."""
        done = self.complete() - self.start
        if done < 0.05:
            return ""
        seconds = (time.monotonic() - self.began) / done * (len(self.grid.runs) - self.start - done)
        return f"about {str(timedelta(seconds=round(seconds / 60) * 60))[:-3]} h left"
