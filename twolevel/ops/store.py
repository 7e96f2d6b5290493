"""Measurements kept on disk: a JSON file of one value a key, shared by the processes of a user.

Nothing that is wrong with the cache stops a process: it is said once, and this process goes on without.
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from twolevel import durable

# Nothing can be read or written below it.
NOWHERE = Path(os.devnull)

log = logging.getLogger("twolevel.ops")


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/twolevel`, or `~/.cache/twolevel` where that is unset; below `NOWHERE` without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "twolevel"
    except RuntimeError:
        return NOWHERE / "twolevel"


def make_folder(folder: Path) -> None:
    """Make a cache that only this user can write, whatever new folders are by default."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)


@cache
def warn(message: str) -> None:
    """Once a process."""
    log.warning(message)


def warn_of_cache(folder: Path, error: OSError) -> None:
    """Say that a cache cannot be used, why, and what to do."""
    what = f"the cache {folder} cannot be used ({error.strerror or error})"
    if folder.is_relative_to(NOWHERE):
        what = "there is no cache, as this user has no home folder"
    warn(
        f"{what}: kernels are compiled and measured for this process alone; "
        "set XDG_CACHE_HOME to a folder of this user"
    )


class Store:
    """Values by key, read once; a file that cannot be read or written keeps them for this process alone."""

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, Any] = {}
        with self._faults_said():
            self._known = self._read()

    def get(self, key: str) -> Any | None:
        return self._known.get(key)

    def keep(self, key: str, value: Any, *, replace: bool = True) -> Any:
        """Add a value, here and in the file, beside what other processes have written; returns what now holds.

        Without `replace` the first to keep a key decides for all: ranks that measure at once go on alike.
        """
        with self._faults_said(), self._lock():
            self._known |= self._read()
            if replace or key not in self._known:
                self._write({**self._known, key: value})
        if replace:
            self._known[key] = value
        return self._known.setdefault(key, value)

    @contextlib.contextmanager
    def _faults_said(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            warn(f"{self.path} is damaged ({error}): kernels are measured for this process alone; delete it")
        except OSError as error:
            warn_of_cache(self.path.parent, error)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        make_folder(self.path.parent)
        with open(self.path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            yield

    def _write(self, known: dict[str, Any]) -> None:
        durable.write_text(self.path, json.dumps(known, indent=1, sort_keys=True) + "\n")

    def _read(self) -> dict[str, Any]:
        """Raises ValueError for a file that `keep` has not written, OSError for one that cannot be read."""
        try:
            known = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except IsADirectoryError as error:
            raise ValueError("it is a folder") from error
        except RecursionError as error:
            raise ValueError("too many brackets") from error
        if not isinstance(known, dict):
            raise ValueError(f"not an object, but a {type(known).__name__}")
        return known
