"""Which format an exported file is of."""

from pathlib import Path

from twolevel.errors import UserError, unknown
from twolevel.settings import EXPORT_SUFFIXES


def format_of(path: Path, asked: str | None = None) -> str:
    """The format of a file to write: the one that is asked for, else that of its suffix.

    Raises UserError for an unknown format, for a suffix that is of another one, and for an unknown suffix where none
    is asked for.
    """
    if asked is not None and asked not in EXPORT_SUFFIXES:
        raise unknown("format", asked, EXPORT_SUFFIXES)
    suffix = path.suffix.lower()
    by_suffix = next((format for format, own in EXPORT_SUFFIXES.items() if own == suffix), None)
    format = asked or by_suffix
    if format is None:
        raise UserError(
            f"the suffix {suffix!r} of {path} names no format; use {', '.join(EXPORT_SUFFIXES.values())}, "
            f"or say format={' or '.join(EXPORT_SUFFIXES)}"
        )
    if by_suffix not in (None, format):
        raise UserError(
            f"format={format} is not that of {path}; use a name that ends in {EXPORT_SUFFIXES[format]}, "
            f"or format={by_suffix}"
        )
    return format
