"""The processes of a trial, found by a variable of their environment, and where a run is by the files it writes."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from twolevel.training import metrics

MARK = "TWOLEVEL_TRIAL"
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK")
POLL_S = 0.002


def of(trial: str, rank: int | None = None) -> list[int]:
    """The processes of a trial, or those that are this rank of it; launchers are no ranks."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            variables = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            wanted = {f"{name}={rank}" for name in RANK_VARIABLES}
            if f"{MARK}={trial}" in variables and (rank is None or variables & wanted):
                found.append(int(folder.name))
    return found


def send(which: signal.Signals, trial: str, rank: int | None = None) -> bool:
    """Send a signal to the processes of a trial, or to those that are this rank of it; whether there are any."""
    found = of(trial, rank)
    for process in found:
        with contextlib.suppress(OSError):  # it has just ended
            os.kill(process, which)
    return bool(found)


def wait_for(happened: Callable[[], object], limit_s: float) -> bool:
    """Look until it has happened or the time is up; whether it has."""
    until = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)
    return True


def is_saving(run: Path, step: int | None = None) -> bool:
    """Whether a checkpoint is being written, or that of this step."""
    name = "*" if step is None else f"{step:08d}"
    return any((run / "checkpoints").glob(f".step-{name}.unfinished"))


def place(run: Path, steps_per_epoch: int) -> str:
    """What a run is doing now, by its files."""
    seen = [*metrics.read(run)]
    if is_saving(run):
        return "save"
    if not seen:
        return "start-up"
    last = seen[-1]
    ended = last["kind"] == "step" and last["step"] % steps_per_epoch == 0
    return "evaluation" if ended else "step"
