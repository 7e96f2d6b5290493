"""What the lines of finished runs are of: cases, which differ in more than the seed, and sections that compare them."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

NAMES = {
    "sc": "standard",
    "gc": "group",
    "shuffle": "shuffle",
    "flgc": "FLGC",
    "bgc": "BGC",
    "dgconv": "DGConv",
    "dgc": "DGC",
    "lgc": "LGC",
    "gc2l": "GC-2L",
}
# Declared settings that a case says by itself, or that change no result.
SAID = {"data", "model", "conv", "groups", "representatives", "seed", "precision", "parallel"}
SAID |= {"data_parallel", "group_parallel", "mirrored_test", "image_size"}

Line = dict[str, Any]


class Case(NamedTuple):
    """What was trained, but for the seed. `variant` are settings by which cases of one section differ."""

    data: str
    model: str
    conv: str
    groups: int
    representatives: int
    ranks: int
    recipe: str
    epochs: int
    variant: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, line: Line, variant: Iterable[tuple[str, Any]] = ()) -> "Case":
        got = line["completed"]
        ranks = got["data_parallel"] * got["group_parallel"]
        more = (got["groups"], got.get("representatives", 1), ranks, got["recipe"], got["epochs"])
        return cls(got["data"], got["model"], got["conv"], *more, tuple(variant))

    @property
    def kind(self) -> str:
        """In tables and legends."""
        more = [f"{self.representatives} repr."] if self.representatives > 1 else []
        more += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        more += [f"{name} {value}" for name, value in self.variant]
        return ", ".join([NAMES.get(self.conv, self.conv), *more])

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it stands among others: standard convolution first, one kind after the other."""
        order = [*NAMES, self.conv].index(self.conv)
        return (order, self.representatives, len(self.variant), str(self.variant), self.groups, self.ranks)


Found = dict[Case, list[Line]]


@dataclass(frozen=True)
class Section:
    """Cases of one network and data set that are compared: their lines by seed, and the settings that all have."""

    model: str
    data: str
    common: dict[str, Any]
    cases: Found

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(case.kind for case in self.cases))


def sections(lines: Iterable[Line]) -> list[Section]:
    """Together are runs of one recipe and length, or of a grid that varies these; of equal runs there the later."""
    lines = list(lines)
    lengths = defaultdict(set)
    for line in lines:
        lengths[_network(line), line["grid"]].add(_length(line))
    together: dict[Any, dict[str, Line]] = defaultdict(dict)
    for line in lines:
        varied = len(lengths[_network(line), line["grid"]]) > 1
        place = (_network(line), (line["grid"],) if varied else _length(line))
        together[place][json.dumps(line["completed"], sort_keys=True)] = line
    return [_section(network, [*of_one.values()]) for (network, _), of_one in together.items()]


def _network(line: Line) -> tuple[str, str]:
    return (line["completed"]["model"], line["completed"]["data"])


def _length(line: Line) -> tuple[str, int]:
    return (line["completed"]["recipe"], line["completed"]["epochs"])


def _section(network: tuple[str, str], lines: list[Line]) -> Section:
    declared = [_declared(line) for line in lines]
    common = {k: v for k, v in declared[0].items() if all(k in other and other[k] == v for other in declared)}
    found: dict[Case, dict[int, Line]] = defaultdict(dict)
    for line, settings in zip(lines, declared, strict=True):
        case = Case.of(line, ((k, v) for k, v in settings.items() if k not in common))
        found[case][line["completed"]["seed"]] = line
    cases = {
        case: [found[case][s] for s in sorted(found[case])] for case in sorted(found, key=lambda c: c.place)
    }
    return Section(*network, common, cases)


def _declared(line: Line) -> dict[str, Any]:
    """What its grid says of a run, and recipe and epochs; a list as a tuple, which a case can hold."""
    names = dict.fromkeys(["recipe", "epochs", *line["settings"]])
    values = {name: line["completed"][name] for name in names if name in line["completed"].keys() - SAID}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def errors_of(lines: list[Line]) -> list[float]:
    return [line["final"]["test_error"] for line in lines]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
