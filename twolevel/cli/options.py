"""Options of a command, from the command line into a dataclass."""

import contextlib
import io
import re
from typing import TypeVar

import tyro

from twolevel.errors import UserError

T = TypeVar("T")

# What other programs call an option, where the spelling leads to another one.
ELSEWHERE = {"--lr": "--learning-rate", "--wd": "--weight-decay"}


def parse(cls: type[T], name: str, argv: list[str], default: T | None = None) -> T:
    """An instance of the dataclass `cls` from options; its parts' options have no prefix."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                cls,
                prog=f"twolevel {name}",
                args=argv,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if end.code in (0, None):  # --help
            raise
        raise UserError(_one_line(box.getvalue())) from None


def _one_line(box: str) -> str:
    """The message of tyro's error box and the nearest option.

    The box is drawn with lines, in ASCII, or without a frame, as the output's encoding allows; its title is in
    the frame or a paragraph of its own, and paragraphs are parted by rules.
    """
    paragraphs, framed = [[]], False
    for line in box.splitlines():
        framed = framed or line.startswith(("│", "|"))
        line = line.strip("│| ")
        if line.startswith(("╭", "╰", "+")):
            continue
        if line.strip("─-"):
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    paragraphs = [" ".join(lines) for lines in paragraphs if lines][0 if framed else 1 :]
    text = paragraphs[0] if paragraphs else "the options cannot be read"
    near = re.search(r"Perhaps you meant: .*?(--[\w-]+)", " ".join(paragraphs[1:]))
    given = re.search(r"options: (--[\w-]+)", text)
    meant = (given and ELSEWHERE.get(given[1])) or (near and near[1])
    if meant:
        text += f"; did you mean {meant}?"
    text = re.sub(
        r"no type matching \{None\}\|(\S+) could be instantiated from \['(.*)'\]\.?",
        r"expected \1, not '\2'",
        text,
    )
    # "Error parsing data: ..." names the section of the configuration, which a user need not know.
    return re.sub(r"^Error parsing [\w.]+: ", "", text)
