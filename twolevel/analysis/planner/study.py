"""Time against processors, on paper: the best of each strategy for 1, 2, 4, ... ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from twolevel.analysis.planner.costs.base import Cost
from twolevel.analysis.planner.plan import Networks, Request, costs

# Lines of the study, in order: name, and which costs belong to it.
SERIES: dict[str, Callable[[Cost], bool]] = {
    "SC DDP": lambda c: c.strategy == "ddp",
    "SC FSDP": lambda c: c.strategy == "fsdp",
    "SC channel": lambda c: c.strategy == "channel",
    "SC naive": lambda c: c.strategy == "naive",
    "SC gpipe": lambda c: c.strategy == "gpipe",
    "SC 1f1b": lambda c: c.strategy == "1f1b",
    "replicas of G groups": lambda c: c.strategy == "group" and c.inner == 1,
    "group, G = P": lambda c: (
        c.strategy == "group" and c.inner == c.groups == c.ranks and not c.two_level_exchange
    ),
    "group, G = P, two-level exchange": lambda c: (
        c.strategy == "group" and c.inner == c.groups == c.ranks and c.two_level_exchange
    ),
    "group, G = 4 P": lambda c: (
        c.strategy == "group" and 4 * c.inner == c.groups == 4 * c.ranks and not c.two_level_exchange
    ),
    "data x group": lambda c: c.strategy == "group" and c.inner > 1 and not c.two_level_exchange,
}


@dataclass(frozen=True)
class Point:
    """The fastest of a series on so many ranks: of those that fit, else of all."""

    series: str
    ranks: int
    cost: Cost


def study(request: Request) -> list[Point]:
    """The points of every series for 1, 2, 4, ... up to `request.ranks` ranks, the same batch throughout.

    Raises UserError as `costs`.
    """
    networks, points, ranks = Networks(request), [], 1
    while ranks <= request.ranks:
        found = costs(replace(request, ranks=ranks), networks, two_level_exchange=True)
        for name, belongs in SERIES.items():
            mine = [cost for cost in found if belongs(cost)]
            if mine:
                points.append(Point(name, ranks, next((c for c in mine if c.fits), mine[0])))
        ranks *= 2
    return points
