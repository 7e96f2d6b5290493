"""What a check says, and what ranks say together."""

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from twolevel.distributed.agreement import all_gather, together
from twolevel.errors import UserError

MOST_NAMED = 8
Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is right, what was found, and what to change where it is not."""

    what: str
    level: Level
    finding: str
    advice: str = ""


def ok(what: str, finding: str) -> Finding:
    return Finding(what, "ok", finding)


def warning(what: str, finding: str, advice: str) -> Finding:
    """Of what would slow a run down, or may end it."""
    return Finding(what, "warning", finding, advice)


def problem(what: str, finding: str, advice: str) -> Finding:
    """Of what would end a run."""
    return Finding(what, "problem", finding, advice)


def guarded(what: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check, or what its error says; a check with collectives raises on all ranks or on none."""
    try:
        return [*check()]
    except UserError as error:
        finding, _, advice = str(error).partition("; ")
    except OSError as error:
        finding, advice = f"{error.filename}: {error.strerror}", "see that it can be read"
    return [problem(what, finding, advice)]


def gather(look: Callable[[], Any]) -> list[Any]:
    """What `look` gives on each rank, in their order; a collective. It must hold no collective itself.

    Raises UserError, on every rank, where `look` raises one or an OSError on some rank.
    """
    own = None
    with together():
        try:
            own = look()
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise UserError(f"{what}{error.strerror or error}") from error
    return all_gather(own)


def from_ranks(look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of all ranks, each once; a collective."""
    reports = gather(lambda: {"host": socket.gethostname(), "findings": [asdict(each) for each in look()]})
    return merge([(r["host"], [Finding(**each) for each in r["findings"]]) for r in reports])


def merge(reports: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """One list out of those of ranks, with their hosts: of what is wrong, in the words of the first who says so.

    Where not all that looked say it, those who do are named. What is right is rank 0's.
    """
    merged: list[Finding] = []
    for what in dict.fromkeys(finding.what for _, findings in reports for finding in findings):
        asked = [findings for _, findings in reports if any(finding.what == what for finding in findings)]
        wrong: dict[tuple[Level, str], list[int]] = {}
        first: dict[tuple[Level, str], Finding] = {}
        for rank, (_, findings) in enumerate(reports):
            for finding in findings:
                if finding.what == what and finding.level != "ok":
                    key = (finding.level, finding.advice)
                    first.setdefault(key, finding)
                    ranks = wrong.setdefault(key, [])
                    ranks += [rank] * (rank not in ranks)
        if not wrong:
            merged += [finding for finding in asked[0] if finding.what == what]
        for key, ranks in wrong.items():
            named = "" if len(ranks) == len(asked) else f"{naming(ranks, [host for host, _ in reports])}: "
            merged.append(replace(first[key], finding=f"{named}{first[key].finding}"))
    return merged


def naming(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks and their hosts: "rank 3 on node2", "ranks 2, 3 on node2"."""
    there = _few([*dict.fromkeys(hosts[rank] for rank in ranks)])
    return f"rank{'s' if len(ranks) > 1 else ''} {_few(ranks)} on {there}"


def _few(names: Sequence[object]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(str, names[:MOST_NAMED])) + more


def size(number: float) -> str:
    """Bytes, for people: "1.5 GiB"."""
    units = ["TiB", "GiB", "MiB", "KiB", "bytes"]
    unit = units.pop()
    while number >= 1024 and units:
        number, unit = number / 1024, units.pop()
    return f"{number:.0f} {unit}" if number >= 100 or unit == "bytes" else f"{number:.1f} {unit}"


def count(number: int, what: str) -> str:
    """A number of things: "1 rank", "2 ranks"."""
    return f"{number:,} {what}{'s' * (number != 1)}"
