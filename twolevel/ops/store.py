"""Measurements kept on disk: a JSON file of one value a key, shared by the processes of a user."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twolevel.errors import UserError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/twolevel`, or `~/.cache/twolevel` where that is unset."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "twolevel"


class Store:
    """Values by key, read once; a folder that cannot be written keeps them for this process alone.

    Raises UserError for a file that `keep` has not written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known = self._read()

    def get(self, key: str) -> Any | None:
        return self._known.get(key)

    def keep(self, key: str, value: Any, *, replace: bool = True) -> Any:
        """Add a value, here and in the file, beside what other processes have written; returns what now holds.

        Without `replace` the first to keep a key decides for all: ranks that measure at once go on alike.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._lock())
                written = self._read()
            except OSError:
                written = {}
            known = {**self._known, **written}
            if replace or key not in known:
                known[key] = value
                with contextlib.suppress(OSError):
                    self._write(known)
            self._known = known
        return self._known[key]

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            yield

    def _write(self, known: dict[str, Any]) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(known, indent=1, sort_keys=True) + "\n")
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self.path.read_text())
        except OSError:  # not there, or not for us to read
            return {}
        except ValueError as error:
            raise UserError(f"{self.path} is not a file of measured choices ({error}); delete it") from error
        if not isinstance(known, dict):
            raise UserError(f"{self.path} is not a file of measured choices; delete it")
        return known
