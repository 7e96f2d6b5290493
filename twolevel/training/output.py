"""The output folder of a run: one that all ranks see, and this run's alone until it ends."""

import contextlib
import fcntl
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from twolevel.distributed.agreement import all_gather, together
from twolevel.errors import UserError
from twolevel.training import checkpoint

LOCK = ".lock"
# What a run leaves; a new run does not begin among it.
LEFTOVERS = ("config.json", "metrics.jsonl", "epochs.csv", "checkpoints")
# A network file system may show a new file to other nodes only after some time.
APPEARS_SECONDS, LOOK_SECONDS = 10.0, 0.1
# How long a restarted run waits for a lock whose owner is dying: a launcher kills what does not end by then.
DYING_SECONDS = 30.0


@contextlib.contextmanager
def claim(
    output: Path, *, resume: bool, first: bool, device: torch.device, restarted: bool = False
) -> Iterator[Path | None]:
    """Hold a run's folder for as long as the context lasts; every rank enters it. Rank 0 (`first`) locks it.

    Gives the checkpoint to go on from, None for a new run. A crash releases the lock, for which ranks that were
    `restarted` wait a little.

    Raises UserError, on every rank: the folder cannot be written, another run holds it, it holds a run already and
    `resume` is not asked for, or not all ranks see it.
    """
    with contextlib.ExitStack() as held:
        with together(device):
            if first:
                held.enter_context(folder(output))
                held.enter_context(_lock(output, DYING_SECONDS if restarted else 0.0))
                check_leftovers(output, resume)
                checkpoint.recover(output / "checkpoints")
        check_shared(output, first=first, device=device)
        yield _start(output) if resume else None


def check_shared(output: Path, *, first: bool, device: torch.device | None = None) -> None:
    """Raise UserError, on every rank, unless all of them see in this folder what rank 0 (`first`) writes there."""
    mark = None
    with together(device):
        if first:
            mark = output / f".seen-{secrets.token_hex(8)}"
            _write(mark)
    mark = all_gather(mark and mark.name, device)[0]
    try:
        with together(device):
            _look_for(output / mark)
    finally:
        if first:
            (output / mark).unlink(missing_ok=True)


@contextlib.contextmanager
def folder(output: Path) -> Iterator[None]:
    """Make the folder; what is new of it and of those above it, and stays empty, is removed in the end."""
    _check_folder(output)
    new = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: a run has begun there
            for path in new:
                path.rmdir()


@contextlib.contextmanager
def _lock(output: Path, wait_s: float = 0.0) -> Iterator[None]:
    """The folder's lock. The system releases it with the process, whatever ends that; forks do not inherit it."""
    path = output / LOCK
    try:
        file = _locked(path, wait_s)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def is_in_use(output: Path) -> bool:
    """Whether a run of another process holds this folder."""
    try:
        with (output / LOCK).open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or where nothing can be locked
        return True
    return False


def _locked(path: Path, wait_s: float) -> int:
    until = time.monotonic() + wait_s
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
            os.close(file)
            if time.monotonic() < until:
                time.sleep(LOOK_SECONDS)
                continue
            raise UserError(
                f"output={path.parent} is in use by a run ({owner}); wait until it ends, or name another --output"
            ) from None
        except OSError as error:
            warnings.warn(
                f"output={path.parent} cannot be locked ({error.strerror}): start no second run in it",
                stacklevel=2,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):  # else its last owner has just removed it
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return file
        os.close(file)


def check_free(output: Path, *, resume: bool) -> None:
    """Raise UserError where a run cannot have this folder, of which nothing is made or locked here."""
    _check_folder(output)
    if is_in_use(output):
        raise UserError(f"output={output} is in use by another run; wait for it, or name another --output")
    check_leftovers(output, resume)


def _check_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; name a folder")


def check_leftovers(output: Path, resume: bool) -> None:
    """Raise UserError where the folder holds a run already and `resume` is not asked for."""
    left = [name for name in LEFTOVERS if (output / name).exists()]
    if left and not resume:
        raise UserError(
            f"output={output} holds a run already; go on with --resume, or name another --output "
            f"(found {', '.join(left)})"
        )


def _start(output: Path) -> Path | None:
    """The newest checkpoint that is whole; every rank calls this."""
    start = checkpoint.newest_good(output / "checkpoints", set_aside=True)
    if start is None:
        warnings.warn(
            f"nothing to resume in {output}: starting from the beginning; is --output right?", stacklevel=2
        )
    return start


def _write(mark: Path) -> None:
    """A file that the other ranks look for, not so small that a full disk would take it."""
    try:
        mark.write_bytes(bytes(2**16))
    except OSError as error:
        raise UserError(f"output={mark.parent} cannot be written: {error.strerror}") from error


def _look_for(mark: Path) -> None:
    if not appears(mark):
        raise UserError(
            f"output={mark.parent}, {mark.parent.absolute()} on {socket.gethostname()}, is not the folder that "
            "rank 0 writes; give an absolute --output on a file system that all ranks share"
        )


def appears(path: Path) -> bool:
    """Whether a path is there, or soon: a network file system may show it to other machines later."""
    until = time.monotonic() + APPEARS_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_SECONDS)
    return True
