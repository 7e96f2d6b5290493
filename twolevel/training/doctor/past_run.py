"""What a run has left: its checkpoints, each verified, its records, and what a crash left over."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from twolevel.distributed.agreement import all_gather, together
from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.models import files
from twolevel.training import checkpoint, metrics
from twolevel.training.config import TrainConfig
from twolevel.training.doctor.finding import Finding, gather, guarded, ok, problem, size, warning
from twolevel.training.doctor.room import check_room, checkpoint_bytes
from twolevel.training.output import LEFTOVERS, is_in_use


def check(world: World, path: Path) -> Iterator[Finding]:
    """Of a run's folder, one of its checkpoints, or an exported file. Every rank calls this; it changes nothing.

    Raises UserError, on every rank, where `path` is none of these.
    """
    with together():
        kind = _kind(path)
    kind = all_gather(kind)[0]
    if kind == "file":
        yield _exported(path)
    elif kind == "checkpoint":
        yield from _checkpoint(path, "remove it, and use another checkpoint")
    else:
        yield from _run(world, path)


def _kind(path: Path) -> str:
    if path.is_file():
        return "file"
    if not path.is_dir():
        raise UserError(f"{path} is not there; give a run's folder, one of its checkpoints, or a file")
    if any((path / name).exists() for name in (checkpoint.STATE, checkpoint.SUMS)):
        return "checkpoint"
    if any((path / name).exists() for name in LEFTOVERS):
        return "run"
    raise UserError(f"{path} holds no run; give a run's folder, one of its checkpoints, or a file")


def _exported(path: Path) -> Finding:
    try:
        options, _, tensors = files.read(path)
    except UserError as error:
        return problem("file", str(error), "export it again")
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        finding = f"{path}: {len(bad)} of {len(tensors)} tensors are not finite, {bad[0]} among them"
        return problem("file", finding, "export an earlier checkpoint")
    about = f"{options['name']}, {len(tensors)} tensors, all finite, {size(path.stat().st_size)}"
    return ok("file", f"{path}: {about}")


def _checkpoint(path: Path, advice: str) -> Iterator[Finding]:
    """Nothing of one that a run has removed in the meantime."""
    why = checkpoint.damage_of(path)
    about = gather(lambda: _about(path) if why is None and path.exists() else "")[0]
    if about:
        yield ok(path.name, about)
    elif all_gather(path.exists())[0]:
        yield problem(path.name, why or "it has just been removed", advice)


def _about(path: Path) -> str:
    state = checkpoint.read_state(path)
    sizes = [file.stat().st_size for file in path.iterdir()]
    error = state.get("test_error")
    tested = "not tested" if error is None else f"test error {error:.2f} %"
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / checkpoint.SUMS).stat().st_mtime))
    return f"step {state['step']}, {tested}, {len(sizes)} files of {size(sum(sizes))}, written {written}"


def _run(world: World, output: Path) -> Iterator[Finding]:
    root = output / "checkpoints"
    used: bool = all_gather(is_in_use(output))[0]
    yield ok("in use", "a run holds the folder now" if used else "no run holds the folder")
    yield from checkpoints(output)
    yield from _leftovers(root, used)
    yield from _records(output)
    config = None
    try:
        config = _config(output)
        yield ok("config.json", f"{config.model.model} {config.model.conv} on {config.data.data}")
    except UserError as error:
        yield problem("config.json", str(error), "--resume writes it anew, from the options that it is given")
    if config is not None:
        yield from guarded("room", lambda: check_room(config, checkpoint_bytes(config), world.size, output))


def checkpoints(output: Path) -> Iterator[Finding]:
    """Each checkpoint of a run, and the one from which it would go on. Every rank calls this."""
    root = output / "checkpoints"
    steps: list[int] = all_gather([*checkpoint.complete(root)])[0]
    good: list[str] = []
    for step in steps:
        path = checkpoint.folder(root, step)
        advice = f"--resume passes over it; look for a failing disk, then rm -r {path}"
        for finding in _checkpoint(path, advice):
            good += [path.name] * (finding.level == "ok")
            yield finding
    yield _resumed(good, len(steps))


def _resumed(good: list[str], number: int) -> Finding:
    if good:
        return ok("resume", f"--resume goes on from {good[-1]}")
    if number:
        return problem("resume", "no checkpoint can be used", "start the run again in another folder")
    return warning("resume", "there is no checkpoint", "--resume starts from the beginning")


def _leftovers(root: Path, used: bool) -> Iterator[Finding]:
    hidden = [] if used else [*root.glob(".step-*.unfinished"), *root.glob(".step-*.replaced")]
    if hidden:
        finding = f"a crash left {', '.join(sorted(path.name for path in hidden))}"
        yield warning("leftovers", finding, "--resume brings them in order; nothing is to be done by hand")
    aside = sorted(root.glob("step-*.damaged"))
    if aside:
        finding = f"{', '.join(path.name for path in aside)} was set aside as damaged"
        yield warning("set aside", finding, f"look for a failing disk, then rm -r {root}/step-*.damaged")
    if not hidden and not aside:
        yield ok("leftovers", "none of a crash")


def _records(output: Path) -> Iterator[Finding]:
    path = output / metrics.LINES
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        yield problem(path.name, f"{path} cannot be read: {error.strerror}", "--resume begins a new one")
        return
    whole = sum(metrics.parse(line) is not None for line in lines)
    if whole == len(lines):
        yield ok(path.name, f"{whole:,} records")
    else:
        finding = f"{len(lines) - whole:,} of {len(lines):,} lines are damaged"
        yield warning(path.name, finding, "they are passed over; look for a full or failing disk")


def _config(output: Path) -> TrainConfig:
    path = output / "config.json"
    try:
        return TrainConfig.from_dict(json.loads(path.read_text()), str(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} cannot be read: {reason}") from error
