"""What a user did wrong, in one line."""

import difflib
from collections.abc import Iterable

LOST_RANK = 75
"""The status of a process whose run another rank has ended, EX_TEMPFAIL: started again, it may succeed."""


class UserError(ValueError):
    """An input that cannot be honoured: the message names it, its value and what would do.

    The command line prints the message alone; any other exception is a defect, with its traceback.
    """


class LostRank(UserError):
    """Another rank did not come, or is gone: started again, the same may succeed."""


class NotFinite(UserError):
    """A loss, a gradient or a weight is infinite or no number; raised on every rank."""


class Stopped(Exception):
    """A run was asked to stop, and has: all that it did is in a checkpoint. The message says where."""


class SpareEnded(Exception):
    """This rank had no part in a run, waited for its end, and that has come."""


def unknown(what: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not one of `known`, with the nearest names first."""
    known = sorted(known)
    near = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(known)}"
    return UserError(f"unknown {what} {value!r}; {hint}")
