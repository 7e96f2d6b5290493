"""What is measured: cases, and jobs of cases whose steps take turns in the same ranks."""

import re
from dataclasses import asdict, dataclass, replace

from benchmarks.strategies import ALONE
from twolevel.errors import UserError

STRONG, WEAK_BATCH, WEAK_WIDTH = "strong", "weak-batch", "weak-width"


@dataclass(frozen=True)
class Case:
    """One training step, to be timed: `batch` images over all ranks together.

    `crosses` is False for the same step with nothing sent. `exchange` is what carries the representatives.
    """

    strategy: str
    model: str
    conv: str
    groups: int
    batch: int
    ranks: int
    scaling: str = STRONG
    exchange: str = "group"
    crosses: bool = True

    @property
    def name(self) -> str:
        """What tells it from the others of a job."""
        kept = {k: v for k, v in asdict(self).items() if k != "ranks"}
        return " ".join(map(str, kept.values()))

    def silent(self) -> "Case":
        return replace(self, crosses=False, exchange="group")

    def alone(self) -> "Case":
        """What one rank does with the same work: all of it (strong), or what each of P ranks has (weak)."""
        case = replace(self, strategy=ALONE, ranks=1, scaling=STRONG, exchange="group", crosses=True)
        if self.scaling == WEAK_BATCH:
            return replace(case, batch=self.batch // self.ranks)
        if self.scaling == WEAK_WIDTH:
            return replace(
                case,
                model=widened(self.model, 1 / self.ranks),
                groups=self.groups // self.ranks if self.strategy == "group" else 1,
            )
        return case


@dataclass(frozen=True)
class Job:
    """Cases that take turns in one set of ranks, which `launcher` starts, over `link`."""

    ranks: int
    launcher: str
    link: str
    cases: tuple[Case, ...]


def widened(model: str, factor: float) -> str:
    """wrn-16-4 widened by 2 is wrn-16-8. Raises UserError for other networks and for widths that are no integers."""
    match = re.fullmatch(r"(wrn-\d+)-(\d+)", model)
    width = int(match[2]) * factor if match else 0.5
    if model == "wrn-34-2" or width != int(width):
        raise UserError(
            f"--weak width: {model} cannot be made {factor:g} times as wide; use a wrn-D-k for 32 x 32"
        )
    return f"{match[1]}-{int(width)}"


def cases_of(
    strategies: tuple[str, ...],
    model: str,
    conv: str,
    groups: tuple[int, ...],
    batch: int,
    ranks: int,
    weak: tuple[str, ...] = (),
    exchanges: tuple[str, ...] = ("group",),
) -> list[Case]:
    """What P ranks are timed with: `group` with every G that P divides and every exchange, the others densely."""
    if ranks < 2:
        return []
    found = []
    for strategy in strategies:
        if strategy == "group":
            kinds = [(conv, g, e) for g in groups if g % ranks == 0 for e in exchanges]
        else:
            kinds = [("sc", 1, "group")]
        for kind, number, exchange in kinds:
            case = Case(strategy, model, kind, number, batch, ranks, exchange=exchange)
            found.append(case)
            if "batch" in weak:
                found.append(replace(case, batch=batch * ranks, scaling=WEAK_BATCH))
            if "width" in weak:
                found.append(replace(case, model=widened(model, ranks), scaling=WEAK_WIDTH))
    return found


def with_peers(cases: list[Case]) -> tuple[Case, ...]:
    """The cases, each with the step it is compared with and the one in which nothing crosses; none twice."""
    peers = [peer for case in cases for peer in (case, case.alone(), case.silent())]
    return tuple(dict.fromkeys(peers))
