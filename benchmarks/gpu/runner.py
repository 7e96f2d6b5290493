"""Runs steps one after the other, each in a process of its own, and keeps in a folder what has become of them.

    FOLDER/steps.json    the machine, and of each step: done, skipped or failed, why, seconds, date, command
    FOLDER/NAME.json     the result of a step, written by itself
    FOLDER/NAME.txt      what it printed
    FOLDER/cache/        compiled kernels, and what was measured of them

A step that is done or skipped is not repeated. One that failed is tried again by the next command, after those that
were not tried yet.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from twolevel import durable
from twolevel.errors import UserError

ROOT = Path(__file__).parents[2]
LONGEST_S = 480.0
# The status of a process that has found out that it cannot run here; its last line says why.
SKIP = 77
# What decides whether two results belong together.
SAME = ("gpu", "torch")
SHOWN_LINES = 30  # of what a step has printed: its table is at the end

_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b|^\S+: error|^benchmarks: ")


@dataclass(frozen=True)
class Step:
    """One measurement: `command` follows `python -m`, and `--output FILE` is added to it."""

    name: str
    what: str
    command: tuple[str, ...]
    takes_s: float
    """About how long it takes; it is not begun where less is left."""
    limit_s: float = LONGEST_S
    """When it is given up."""


class Ledger:
    """What has become of the steps of a folder, on disk after each of them; without `machine` to be read alone.

    Raises UserError for a folder of another card or torch.
    """

    def __init__(self, folder: Path, machine: dict[str, Any] | None = None):
        self.path = folder / "steps.json"
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.machine: dict[str, Any] = before.get("machine", machine or {})
        self.steps: dict[str, dict[str, Any]] = before.get("steps", {})
        for name in SAME:
            if machine is not None and self.machine.get(name) != machine.get(name):
                raise UserError(
                    f"--folder {folder} holds results of {name}={self.machine.get(name)!r}, and this is "
                    f"{name}={machine.get(name)!r}; name another folder"
                )

    def outcome(self, name: str) -> str | None:
        """done, skipped, failed; None for a step that was not tried."""
        return self.steps.get(name, {}).get("outcome")

    def keep(self, name: str, **found: Any) -> None:
        self.steps[name] = {**found, "date": datetime.now().astimezone().isoformat(timespec="seconds")}
        text = json.dumps({"machine": self.machine, "steps": self.steps}, indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(self.path, text)


def due(steps: Sequence[Step], ledger: Ledger, again: Sequence[str] = ()) -> list[Step]:
    """The steps that are to run, in order: those that were not tried or are wanted `again`, then those that failed."""
    fresh = [step for step in steps if ledger.outcome(step.name) is None or step.name in again]
    failed = [step for step in steps if ledger.outcome(step.name) == "failed" and step not in fresh]
    return fresh + failed


def run_steps(
    steps: Sequence[Step],
    ledger: Ledger,
    *,
    budget_s: float,
    again: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> list[Step]:
    """Run what is due, and return the steps that are left for want of time; prints progress."""
    end = time.monotonic() + budget_s
    waiting = due(steps, ledger, again)
    for number, step in enumerate(waiting):
        left = end - time.monotonic()
        about = f"about {step.takes_s:.0f} s" + (f", {left:.0f} s left" if math.isfinite(left) else "")
        if step.takes_s > left:
            print(f"stopped before {step.name} ({about}); the same command goes on there")
            return waiting[number:]
        print(f"[{number + 1}/{len(waiting)}] {step.name}: {step.what} ({about})", flush=True)
        run_step(step, ledger, min(step.limit_s, left), environment)
    return []


def run_step(step: Step, ledger: Ledger, limit_s: float, environment: dict[str, str] | None = None) -> None:
    """Run one step in a process of its own, which is ended after `limit_s`, and keep what has become of it."""
    folder = ledger.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    output, log = (folder.resolve() / f"{step.name}.{kind}" for kind in ("json", "txt"))
    command = [sys.executable, "-m", *step.command, "--output", str(output)]
    output.unlink(missing_ok=True)  # of an earlier try
    began = time.monotonic()
    with log.open("w") as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    outcome, reason = _outcome(status, lines, limit_s, output.exists())
    seconds = round(time.monotonic() - began, 1)
    ledger.keep(step.name, outcome=outcome, reason=reason, seconds=seconds, command=" ".join(command[1:]))
    if outcome == "done":
        print("\n".join(lines[-SHOWN_LINES:]), flush=True)
    print(f"{step.name}: {outcome} after {seconds:.0f} s" + (f": {reason}" if reason else ""), flush=True)


def _end(process: subprocess.Popen) -> None:
    """End what is left of a step: its process and those that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(status: int | None, lines: list[str], limit_s: float, written: bool) -> tuple[str, str | None]:
    """What has become of a step, and why in one line unless it is done."""
    if status is None:
        return "failed", f"it was not done after {limit_s:.0f} s"
    said = [line.strip() for line in lines if line.strip()] or [f"it ended with status {status}"]
    if status == SKIP:
        return "skipped", said[-1]
    if status:  # a traceback ends with the error, but an error may have more lines
        return "failed", ([line for line in said if _ERROR.match(line)] or said)[-1]
    return ("done", None) if written else ("failed", "it has written no result")


def summary(steps: Sequence[Step], ledger: Ledger) -> list[list[str]]:
    """Rows of a table: step, what has become of it, seconds, why."""
    rows = [["step", "outcome", "seconds", "why"]]
    for step in steps:
        found = ledger.steps.get(step.name, {})
        seconds = f"{found['seconds']:.0f}" if found else ""
        rows.append([step.name, found.get("outcome", "not tried"), seconds, found.get("reason") or ""])
    return rows
