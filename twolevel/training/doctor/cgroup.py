"""The limits of the control groups that hold this process, as containers and Slurm set them: versions 1 and 2."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# Version 1 writes the largest multiple of a page in 64 bits where there is no limit.
ENDLESS = 2**62


@dataclass(frozen=True)
class Memory:
    """Bytes that the processes of a group may use, and do, without what the system can take back."""

    limit: int
    used: int


def memory() -> Memory | None:
    """The tightest limit of memory; None where there is none."""
    found = []
    for folder, second in _folders("memory"):
        limit = _number(folder / ("memory.max" if second else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if second else "memory.usage_in_bytes"))
        if limit is not None and used is not None and limit < ENDLESS:
            cached = _field(folder / "memory.stat", "inactive_file" if second else "total_inactive_file")
            found.append(Memory(limit, max(0, used - cached)))
    return min(found, key=lambda memory: memory.limit - memory.used, default=None)


def cores() -> float | None:
    """The seconds of processor that a second may take; None where there is no limit."""
    found = []
    for folder, second in _folders("cpu"):
        if second:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = (_text(folder / f"cpu.cfs_{part}_us") for part in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _folders(controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's group and of those around it, and whether they are of version 2.

    In a container the path may be that on the host, which is not there: then its root alone is found.
    """
    for line in _text(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        second = controllers == ""
        if not second and controller not in controllers.split(","):
            continue
        root = ROOT if second else ROOT / controller
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for number in range(len(parts), -1, -1):
            folder = root.joinpath(*parts[:number])
            if folder.is_dir():
                yield folder, second


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int:
    fields = dict(line.split(" ", 1) for line in _text(path).splitlines() if " " in line)
    return int(fields.get(name, "0"))
