"""Train the runs of a grid that have no line yet, each in a process of its own.

A run is claimed by a lock on its file NAME.lock in the grid's folder for as long as this process trains it: two grids
in one folder share the work. A crash releases what it held, but for runs that outlive it, which are left alone. A run
that was interrupted goes on from its newest checkpoint. Each of a run's ranks has a GPU, or its share of the cores.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from twolevel.errors import Stopped, UserError
from twolevel.grids import results
from twolevel.grids.declare import Grid, Run
from twolevel.grids.progress import Progress
from twolevel.training import metrics
from twolevel.training.output import is_in_use

LOOK_SECONDS = 0.5
TORCHRUN = ("-m", "twolevel.torchrun", "--standalone")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Place:
    """Room for one rank: a number of threads, and a GPU where there are some."""

    threads: int
    gpu: str | None = None


@dataclass
class Trial:
    """A run that is being trained, by `process`, on some of the places."""

    run: Run
    folder: Path
    places: list[int]
    lock: TextIO
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> Path:
        return _log(self.folder)


@dataclass
class Runner:
    """Trains a grid in `folder`, into lines of `lines`, one rank on each of the `places`.

    `module` is run with the options of `twolevel train`, under torchrun where a run has several ranks; `options` are
    such as every run is given that do not belong to the grid (where the data are). `keep` leaves the folders of
    finished runs.
    """

    grid: Grid
    folder: Path
    lines: Path
    places: list[Place]
    options: list[str] = field(default_factory=list)
    keep: bool = False
    module: tuple[str, ...] = ("-m", "twolevel", "train")

    def __post_init__(self):
        self.running: list[Trial] = []
        self.failed: dict[str, str] = {}
        self.elsewhere = 0
        self.stopping: int | None = None

    def run(self) -> list[dict[str, Any]]:
        """Train until every run has a line, or another process trains it; returns the lines that there are.

        Raises UserError where a run needs more places than there are, and where runs failed, once the others are
        done; Stopped where a signal asked for an end.
        """
        most = max(run.ranks for run in self.grid.runs)
        if most > len(self.places):
            raise UserError(
                f"a run of {self.grid.name} has {most} ranks, and there is room for {len(self.places)} here; "
                f"use --at-once {most} on CPUs, or more GPUs"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = results.read(self.lines)
        waiting = deque(run for run in self.grid.runs if results.find(lines, run) is None)
        with Progress(self.grid, self.lines, self._fractions) as progress, self._signals():
            progress.begin(len(self.grid.runs) - len(waiting))
            told = False
            while (waiting and self.stopping is None) or self.running:
                self._start(waiting)
                if not self.running:
                    break
                time.sleep(LOOK_SECONDS)
                if self.stopping is not None and not told:
                    told = True
                    progress.say(f"stopping: {len(self.running)} runs write checkpoints")
                for trial in [trial for trial in self.running if trial.process.poll() is not None]:
                    self._finish(trial, progress)
                progress.look()
        if self.stopping is not None:
            raise Stopped(f"stopped; every run is saved in {self.folder}; go on with the same command")
        if self.failed:
            name, log = next(iter(self.failed.items()))
            raise UserError(
                f"{len(self.failed)} of {len(self.grid.runs)} runs failed; {name} says why in {log}"
            )
        lines = results.read(self.lines)
        return [line for run in self.grid.runs if (line := results.find(lines, run))]

    def _start(self, waiting: deque[Run]) -> None:
        """Fill the free places with runs that nobody trains; those of others are left to them."""
        free = sorted(
            set(range(len(self.places))) - {place for trial in self.running for place in trial.places}
        )
        while waiting and waiting[0].ranks <= len(free) and self.stopping is None:
            run = waiting.popleft()
            lock = _locked(self.folder / f"{run.name}.lock")
            if lock is None or is_in_use(self.folder / run.name):
                self.elsewhere += 1
                if lock is not None:
                    lock.close()
            elif results.find(results.read(self.lines), run):  # finished elsewhere while this one waited
                lock.close()
            else:
                self.running.append(self._begin(run, free[: run.ranks], lock))
                free = free[run.ranks :]
                if self.stopping is not None:  # asked while the run was being started
                    self._ask_to_stop()

    def _begin(self, run: Run, places: list[int], lock: TextIO) -> Trial:
        folder = self.folder / run.name
        config = folder.with_name(f"{run.name}.json")
        config.write_text(json.dumps(run.config().to_dict(), indent=1) + "\n")
        begun = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
        if folder.exists() and not begun:
            shutil.rmtree(folder)  # it ended before its first checkpoint
        words = [
            "--config",
            str(config),
            "--output",
            str(folder),
            *self.options,
            *(["--resume"] if begun else []),
        ]
        several = [*TORCHRUN, "--nproc-per-node", str(run.ranks)] if run.ranks > 1 else []
        with _log(folder).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *several, *self.module, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _environment([self.places[place] for place in places]),
                start_new_session=True,  # a Ctrl-C is passed on once, by this process
            )
        return Trial(run, folder, places, lock, process)

    def _finish(self, trial: Trial, progress: Progress) -> None:
        self.running.remove(trial)
        if trial.process.returncode == 0:
            line = results.line_of(self.grid.name, trial.run, trial.folder)
            results.append(self.lines, line)
            progress.finished(line)
            if not self.keep:
                shutil.rmtree(trial.folder)
                for path in (trial.log, trial.folder.with_name(f"{trial.run.name}.json")):
                    path.unlink()
        elif self.stopping is None:
            self.failed[trial.run.name] = str(trial.log)
            progress.say(f"{trial.run.name} failed: {_last_line(trial.log)}")
        trial.lock.close()

    def _fractions(self) -> dict[str, float]:
        """How much of each run at work is done, by its epochs."""
        return {
            trial.run.name: len([*metrics.read(trial.folder, "epoch")]) / trial.run.config().epochs
            for trial in self.running
        }

    def _ask_to_stop(self) -> None:
        for trial in self.running:
            with contextlib.suppress(ProcessLookupError):
                trial.process.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass what asks this process to stop on to the runs, which write a checkpoint."""

        def stop(number: int, _: object) -> None:
            self.stopping = number
            self._ask_to_stop()

        before = {number: signal.signal(number, stop) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for trial in self.running:  # after an error here
                trial.process.terminate()


def _environment(places: list[Place]) -> dict[str, str]:
    gpus = [place.gpu for place in places if place.gpu is not None]
    shown = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return {"OMP_NUM_THREADS": str(places[0].threads)} | shown


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _locked(path: Path) -> TextIO | None:
    """An open file that holds the lock, None where another process does. Processes started here do not inherit it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"
