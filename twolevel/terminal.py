"""The terminal: its width, tables and paragraphs no wider than that, and what is to be typed there."""

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
from rich.text import Text

ENDLESS = 10_000  # columns where neither a terminal nor COLUMNS sets a limit, as in a log file
GAP = "  "


def width() -> int:
    """Columns of COLUMNS, or of the terminal that a standard stream is; ENDLESS without them."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    for stream in (sys.__stdout__, sys.__stderr__, sys.__stdin__):
        with suppress(OSError, ValueError):  # closed, or no terminal
            if stream is not None and (columns := os.get_terminal_size(stream.fileno()).columns):
                return columns
    return ENDLESS


def program() -> str:
    """What a user types for `twolevel`: its name where the PATH leads to this environment, else where it is."""
    here = Path(sys.executable).with_name("twolevel")
    if shutil.which("twolevel") == str(here):
        return "twolevel"
    words = [_typed(here)] if here.exists() else [_typed(Path(sys.executable)), "-m", "twolevel"]
    return shlex.join(words)


def _typed(path: Path) -> str:
    """Relative to the working directory where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class Console(rich.console.Console):
    """Prints lines as they are: no markup, colours of numbers, wrapping or cutting."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def on_broken_pipe(self) -> None:
        raise  # to `twolevel.cli.entry`, which knows what to do where `head` has seen enough

    def paragraph(self, text: str) -> None:
        """Break between words, and indent what continues."""
        self.print("\n".join(_wrapped(text)))


@dataclass(frozen=True)
class Column:
    """One column of a table; where not all fit, those with the lowest `need` are left out."""

    heading: str
    cells: Sequence[str]
    need: int = 0
    left: bool = False

    @property
    def width(self) -> int:
        return max(map(len, (self.heading, *self.cells)))

    def lines(self) -> list[str]:
        return [f"{text:{'<' if self.left else '>'}{self.width}}" for text in (self.heading, *self.cells)]


def print_table(console: Console, columns: Sequence[Column], *, styles: Iterable[str] = ()) -> None:
    """Print columns side by side, as many as fit, and name those that do not; `styles` are of the rows."""
    limit, shown = width(), list(columns)
    while _total(shown) > limit and len(shown) > 1:
        shown.remove(min(shown, key=lambda column: column.need))
    _print_rows(console, shown, styles)
    if len(shown) < len(columns):
        missing = ", ".join(column.heading for column in columns if column not in shown)
        console.print()
        console.paragraph(
            f"Left out in {limit} columns: {missing}. COLUMNS={_total(columns)} or --json shows all."
        )


def print_stacked(console: Console, first: Column, columns: Sequence[Column]) -> None:
    """Print columns side by side, beginning again below, with `first`, where they reach the terminal's width."""
    limit, shown = width(), [first]
    for column in columns:
        if len(shown) > 1 and _total([*shown, column]) > limit:
            _print_rows(console, shown)
            console.print()
            shown = [first]
        shown.append(column)
    _print_rows(console, shown)


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + len(GAP) * (len(columns) - 1)


def _print_rows(console: Console, columns: Sequence[Column], styles: Iterable[str] = ()) -> None:
    heading, *rows = zip(*(column.lines() for column in columns), strict=True)
    console.print(Text(GAP.join(heading).rstrip(), "bold"))
    styles = list(styles) or [""] * len(rows)
    for row, style in zip(rows, styles, strict=True):
        console.print(Text(GAP.join(row).rstrip(), style))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, width(), subsequent_indent=GAP, break_long_words=False, break_on_hyphens=False
    ) or [""]
