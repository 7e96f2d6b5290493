"""The output folder: that all ranks see it, that renames and locks work in it, and how fast it is written."""

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from twolevel import durable
from twolevel.distributed.agreement import all_gather, together
from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.training import output as run_output
from twolevel.training.config import TrainConfig
from twolevel.training.doctor.finding import Finding, gather, guarded, naming, ok, problem, size, warning
from twolevel.training.output import appears

TRIAL_BYTES = 2**26
# A checkpoint is written beside the training, but the next one waits for it.
LONG_SECONDS = 60.0


def check(world: World, config: TrainConfig, checkpoint: int) -> Iterator[Finding]:
    """Try what a run does in its folder, and leave nothing there; `checkpoint` in bytes. Every rank calls this."""
    output, first = config.output, world.rank == 0
    with contextlib.ExitStack() as made:
        with together():
            if first:
                made.enter_context(run_output.folder(output))
                if run_output.is_in_use(output):
                    raise UserError(
                        f"output={output} is in use by a run; wait until it ends, or name another --output"
                    )
                run_output.check_leftovers(output, config.run.resume)
        run_output.check_shared(output, first=first)
        seen = "written by rank 0" if world.size == 1 else f"seen by all {world.size} ranks"
        yield ok("folder", f"{output}, {seen}")
        token = all_gather(secrets.token_hex(4))[0]
        trial = output / f".doctor-{token}"
        try:
            yield from guarded("renames", lambda: _renames(trial, first))
            yield from guarded("locks", lambda: _locks(trial, world))
            yield from guarded("writing", lambda: _writing(trial, world, checkpoint))
        finally:
            all_gather(None)  # nobody looks any more
            for path in output.glob(f"{trial.name}*") if first else ():
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()


def _renames(trial: Path, first: bool) -> Iterator[Finding]:
    """A file takes the place of another, and a folder gets its name; every rank sees both."""
    new, old, folder = (trial.with_name(f"{trial.name}-{name}") for name in ("new", "old", "folder"))

    def rename() -> None:
        if first:
            old.write_text("old")
            new.write_text("new")
            os.replace(new, old)
            new.mkdir()
            durable.sync(new)
            new.rename(folder)

    gather(rename)
    contents = gather(lambda: appears(folder) and old.read_text())
    if all(content == "new" for content in contents):
        yield ok("renames", "a file and a folder were renamed, seen by every rank")
    else:
        ranks = [rank for rank, content in enumerate(contents) if content != "new"]
        yield problem(
            "renames",
            f"ranks {', '.join(map(str, ranks))} do not see what rank 0 has renamed",
            "checkpoints are published by a rename: name an --output on another file system",
        )


def _locks(trial: Path, world: World) -> Iterator[Finding]:
    """Rank 0 locks a file, which the others then cannot."""
    path = trial.with_name(f"{trial.name}-lock")
    with contextlib.ExitStack() as held:

        def hold() -> str | None:
            return lock(path, held) if world.rank == 0 else None

        why = gather(hold)[0]
        got = gather(lambda: world.rank != 0 and lock(path, held) is None)
        all_gather(None)  # until all have tried
    advice = "two runs could begin in one folder: mount it with locks, or start one run at a time there"
    if why is not None:
        yield warning("locks", f"a file of the folder cannot be locked ({why})", advice)
    elif any(got):
        ranks = ", ".join(str(rank) for rank, own in enumerate(got) if own)
        yield warning("locks", f"rank 0 locked a file, and ranks {ranks} could too", advice)
    else:
        beside = "" if world.size == 1 else ", against the other ranks"
        yield ok("locks", f"a file was locked{beside}")


def lock(path: Path, held: contextlib.ExitStack) -> str | None:
    """Lock a file for as long as `held` lasts; why that cannot be done, None where it was."""
    file = held.enter_context(path.open("a"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror
    return None


def _writing(trial: Path, world: World, checkpoint: int) -> Iterator[Finding]:
    """Every rank writes its share at once, as of a checkpoint."""
    share = TRIAL_BYTES // world.size
    reports = gather(
        lambda: {
            "host": socket.gethostname(),
            "seconds": write_seconds(trial.with_name(f"{trial.name}-shard-{world.rank}"), share),
        }
    )
    seconds = [report["seconds"] for report in reports]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    rate = world.size * share / seconds[slowest]
    takes = checkpoint / rate
    found = f"{rate / 1e6:.0f} MB/s to the disk, {takes:.1f} s for a checkpoint of {size(checkpoint)}"
    if takes <= LONG_SECONDS:
        yield ok("writing", found)
        return
    who = f", {naming([slowest], [r['host'] for r in reports])} the slowest" if world.size > 1 else ""
    yield warning("writing", f"{found}{who}", "name an --output on a faster disk, or write them less often")


def write_seconds(path: Path, number: int) -> float:
    """How long so many bytes take to the disk; random ones, as some file systems compress."""
    content = os.urandom(min(number, 2**22))
    start = time.perf_counter()
    with path.open("wb") as file:
        for begin in range(0, number, len(content)):
            file.write(content[: number - begin])
    durable.sync(path)
    return time.perf_counter() - start
