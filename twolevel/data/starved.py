"""What data workers lack, in one line: shared memory, open files, memory."""

import gc
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from twolevel.errors import UserError

# How torch and the system say it, and what to do.
LACKS = {
    r"too many open files": "too many open files for the data workers; raise the limit (ulimit -n 4096)",
    r"shared memory|\bshm\b|bus error|no space left|/torch_\d": "shared memory (/dev/shm) is too small for the data "
    "workers; make it larger (docker run --shm-size=8g, or --ipc=host)",
    r"cannot allocate memory|resource temporarily unavailable": "there is no room for the data workers",
    r"worker .*(exited unexpectedly|killed by signal)": "a data worker was killed, for want of memory perhaps",
}


def starved(error: Exception) -> str | None:
    """The line for an error of data workers that lack something; None for another error."""
    for pattern, line in LACKS.items():
        if re.search(pattern, str(error), re.IGNORECASE):
            return f"{line}, or use fewer --workers"
    return None


def starved_is_said(loader: Iterable[Any], workers: int) -> Iterator[Any]:
    """What a loader gives. Raises UserError where its workers lack something."""
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        line = starved(error) if workers else None
        if line is None:
            raise
        _drop(error)
    else:
        return
    raise UserError(f"workers={workers}: {line}")


def _drop(error: Exception) -> None:
    """Free what the error holds: a loader that was made in part would say so with a traceback, at any time."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = hook
