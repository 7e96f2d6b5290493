"""The folders of checkpoints: their names, what is in them, and whether that is what was written."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from twolevel import durable
from twolevel.distributed.agreement import all_gather
from twolevel.errors import UserError
from twolevel.training.validation import is_number

STATE, SUMS = "state.json", "SHA256SUMS"
REQUIRED = {"config", "num_classes", "step", "epoch_sums", "ranks"}
SECTIONS = {"model", "data", "optimiser", "run"}


class Damaged(UserError):
    """A checkpoint is not what was written."""

    def __init__(self, path: Path, why: object):
        super().__init__(f"checkpoint {path} is damaged: {why}")


def folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return path.with_name(f".{path.name}.unfinished")


def replaced(path: Path) -> Path:
    """Where a checkpoint is for as long as another of the same step takes its name."""
    return path.with_name(f".{path.name}.replaced")


def complete(root: Path) -> dict[int, Path]:
    """The complete checkpoints under `root` by their step, rising. Folders of other names are not ours."""
    found = {
        int(match[1]): path
        for path in (root.iterdir() if root.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def recover(root: Path) -> None:
    """Bring what a crash left under `root` in order: nothing half written, nothing half replaced."""
    for path in root.glob(".step-*.replaced"):
        name = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if name.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(name)
    for path in root.glob(".step-*.unfinished"):
        shutil.rmtree(path, ignore_errors=True)


def publish(path: Path, shards: dict[str, str], state: dict[str, Any]) -> None:
    """Give a checkpoint its name: its shards, whose SHA-256 are given, lie `unfinished`, on the disk."""
    made = unfinished(path)
    text = json.dumps(state, indent=1, allow_nan=False) + "\n"
    sums = shards | {STATE: hashlib.sha256(text.encode()).hexdigest()}
    lines = (f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    for name, content in ((STATE, text), (SUMS, "".join(lines))):
        (made / name).write_text(content)
        durable.sync(made / name)
    durable.sync(made)
    if path.exists():
        shutil.rmtree(replaced(path), ignore_errors=True)
        path.rename(replaced(path))
    made.rename(path)
    durable.sync(path.parent)
    shutil.rmtree(replaced(path), ignore_errors=True)


def digest(file: Path) -> str:
    """The SHA-256 of a file, as in SHA256SUMS."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _no_checkpoint(path: Path) -> UserError:
    return UserError(
        f"{path} is no checkpoint: it has no {STATE}; give one of a run's checkpoints/, or its --output"
    )


def _sums(path: Path) -> dict[str, str]:
    """What SHA256SUMS says. Raises Damaged where it is not what `publish` wrote."""
    try:
        lines = (path / SUMS).read_text().splitlines()
    except FileNotFoundError:
        if not (path / STATE).exists():
            raise _no_checkpoint(path) from None
        raise Damaged(path, f"{SUMS} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(path, f"{SUMS}: {error}") from error
    found = [re.fullmatch(r"([0-9a-f]{64})  ([\w-][\w.-]*)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) != len(lines) or STATE not in sums or len(sums) < 2:
        raise Damaged(path, f"{SUMS} is not what was written")
    if not (path / STATE).exists():
        raise Damaged(path, f"{STATE} is missing")
    there = {file.name for file in path.glob("*.safetensors")}
    if there - sums.keys():
        raise Damaged(path, f"{min(there - sums.keys())} is not one of its files")
    return sums


def verify(path: Path) -> None:
    """Read a checkpoint and compare it with its checksums; among ranks each reads its share of the files.

    Raises Damaged, on the rank that found the damage, and UserError where `path` is no checkpoint.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums = _sums(path)
    state = read_state(path, sums[STATE])
    shards = sorted(sums.keys() - {STATE})
    if len(shards) != state["ranks"]:
        raise Damaged(path, f"{SUMS} is not what was written")
    for name in shards:
        if not (path / name).is_file():
            raise Damaged(path, f"{name} is missing, one of its shards")
    for name in shards[rank::ranks]:
        try:
            same = digest(path / name) == sums[name]
        except OSError as error:
            raise Damaged(path, f"{name}: {error.strerror}") from error
        if not same:
            raise Damaged(path, f"{name} is not what was written: its SHA-256 is another")


def newest_good(root: Path, *, set_aside: bool = False) -> Path | None:
    """The newest checkpoint under `root` that is what was written; None where there is none at all.

    Every rank calls this. Those that are damaged are named in a warning and passed over; with `set_aside` rank 0
    also renames them to step-N.damaged, so that they are not counted among those that a run keeps.

    Raises UserError, on every rank, where all are damaged.
    """
    steps: list[int] = all_gather([*complete(root)])[0]  # rank 0's, as it may be writing
    damaged: dict[Path, str] = {}
    good = None
    for step in reversed(steps):
        path = folder(root, step)
        why = damage_of(path)
        if why is None:
            good = path
            break
        damaged[path] = why
    if damaged and good is None:
        raise UserError(f"no checkpoint in {root} can be used: {'; '.join(damaged.values())}")
    for path, why in damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        kept = f", which is {aside.name} from now on" if set_aside else ""
        assert good is not None
        warnings.warn(f"{why}{kept}; taking {good.name} instead", stacklevel=2)
        if set_aside and (not dist.is_initialized() or dist.get_rank() == 0):
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return good


def damage_of(path: Path) -> str | None:
    """Why a checkpoint is not good, in the words of the first rank that finds it; every rank calls this."""
    own = None
    try:
        verify(path)
    except UserError as error:
        own = str(error)
    return next((why for why in all_gather(own) if why is not None), None)


def read_state(path: Path, expected: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; `expected` is its SHA-256.

    Raises UserError where it is missing, and Damaged where it is not what was written.
    """
    try:
        text = (path / STATE).read_bytes()
        if expected not in (None, hashlib.sha256(text).hexdigest()):
            raise ValueError("it is not what was written: its SHA-256 is another")
        state = json.loads(text)
    except FileNotFoundError:
        raise _no_checkpoint(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(path, f"{STATE}: {error}") from error
    missing: Iterable[str] = REQUIRED - state.keys() if isinstance(state, dict) else REQUIRED
    if not missing:
        config = state["config"]
        missing = SECTIONS - config.keys() if isinstance(config, dict) else SECTIONS
        missing = missing or {name for name in config if not isinstance(config[name], dict)}
    if missing:
        raise Damaged(path, f"{STATE} lacks {', '.join(sorted(missing))}")
    wrong = [name for name, fits in FITS.items() if name in state and not fits(state[name])]
    if wrong:
        raise Damaged(path, f"{STATE}: {wrong[0]}={state[wrong[0]]!r:.60} is invalid")
    return state


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_record(value: object) -> bool:
    """Whether it is what `Epochs.finish` makes."""
    if not isinstance(value, dict) or value.get("kind") != "epoch":
        return False
    counts = [value.get("epoch"), value.get("step")]
    numbers = ("train_loss", "train_error", "learning_rate", "images_per_second", "seconds")
    unknown = [value.get(name) for name in ("memory_mb", "utilisation", "exchange_exposed")]
    return (
        all(map(_is_count, counts))
        and all(is_number(value.get(name, 0)) for name in numbers)
        and all(each is None or is_number(each) for each in unknown)
    )


FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "num_classes", "ranks", "epoch", "position"), _is_count),
    "epoch_sums": lambda sums: isinstance(sums, list) and len(sums) == 3 and all(map(is_number, sums)),
    "epoch_seconds": is_number,
    "test_error": lambda error: error is None or is_number(error),
    "untested": lambda record: record is None or _is_record(record),
}
"""What a state may hold beside its settings, by name."""
