"""What the cost model knows of a machine: its memory, how fast it computes, and its links (imports no torch)."""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Self

from twolevel.errors import UserError

Curve = tuple[tuple[float, float], ...]
"""Points (channels of a group, share of the peak), rising in channels; between them log-linear, level outside."""


def on_curve(curve: Curve, x: float) -> float:
    """The value of a curve at x, by straight lines through the logarithms of both."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            t = math.log(x / x0) / math.log(x1 / x0)
            return math.exp((1 - t) * math.log(y0) + t * math.log(y1))
    return curve[-1][1]


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link between two ranks: a message of s bytes takes latency + s / bandwidth (alpha and 1/beta).

    `latency` in seconds, `bandwidth` in bytes/s one way; between nodes it is that of a whole node.
    """

    name: str
    latency: float
    bandwidth: float
    source: str = ""


NO_LINK = Link(name="none", latency=1e-5, bandwidth=1e10)


@dataclass(frozen=True)
class Table:
    """Measured seconds over a grid: `axes` are names with rising points, `forward` and `backward` in row order.

    Between points it is linear in the logarithms of seconds and coordinates, so exact for powers; beyond the
    ends the last slope goes on, but never faster than the work (slope 1 in pixels and groups, 2 in channels).
    """

    axes: tuple[tuple[str, tuple[float, ...]], ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]

    def at(self, **where: float) -> tuple[float, float]:
        """(forward, backward) seconds at a place, one number for each axis."""
        corners: list[tuple[tuple[int, float], ...]] = []
        for name, points in self.axes:
            x = max(where[name], 1e-9)
            if len(points) == 1:
                corners.append(((0, 1.0),))
                continue
            low = min(max(bisect_right(points, x) - 1, 0), len(points) - 2)
            t = math.log(x / points[low]) / math.log(points[low + 1] / points[low])
            corners.append(((low, 1 - t), (low + 1, t)))
        forward = backward = 0.0
        for corner in product(*corners):
            index, weight = 0, 1.0
            for (position, share), (_, points) in zip(corner, self.axes, strict=True):
                index, weight = index * len(points) + position, weight * share
            forward += weight * math.log(self.forward[index])
            backward += weight * math.log(self.backward[index])
        return math.exp(forward), math.exp(backward)


AXES = {"optimiser": ("elements",), "linear": ("elements",)}
AXES |= dict.fromkeys(("norm", "activation", "add", "mean"), ("channels", "elements"))
AXES |= dict.fromkeys(("conv spatial", "conv pointwise"), ("width", "groups", "pixels"))
AXES |= dict.fromkeys(("two-level spatial", "two-level pointwise"), ("width", "groups", "ranks", "pixels"))
"""What `calibrate` measures, by operation: over what, in this order."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's device and its links.

    `memory` in bytes (0: not limited), of which `reserved` is never a network's (the device's context). `flops`
    (operations/s, two a multiply-accumulate) by precision; `dense` and `grouped` are shares of it that convolutions
    reach, by channels of a group. `bandwidth` of the memory in bytes/s, of which elementwise operations reach
    `streaming`. `overhead` seconds a layer and direction; an output of fewer than `saturation` elements leaves part
    of the device idle. `representative` seconds that restriction and coarse term of one output pixel of one image
    take beyond moving their tensors, forward and backward. `tables`: what `calibrate` measured, by operation; where
    there are any, they are used and the numbers above are not.
    """

    name: str
    source: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    dense: dict[str, Curve] = field(default_factory=dict)
    grouped: dict[str, Curve] = field(default_factory=dict)
    streaming: float = 0.8
    overhead: float = 1e-5
    representative: float = 0.0
    saturation: float = 0.0
    reserved: float = 0.6e9
    fuses: bool = False
    """whether norm, activation and sum are one pass, as under torch.compile"""
    link: Link = NO_LINK
    internode: Link = NO_LINK
    ranks_per_node: int = 8
    tables: dict[str, Table] = field(default_factory=dict)
    precision: str | None = None
    """of `tables`"""

    @property
    def usable(self) -> float:
        """Bytes for tensors: 5 % of the memory are left to the allocator's rounding and to libraries' workspaces."""
        return 0.95 * self.memory - self.reserved if self.memory else math.inf

    def with_links(self, link: Link | None, internode: Link | None, ranks_per_node: int | None) -> Self:
        changed = {"link": link, "internode": internode, "ranks_per_node": ranks_per_node}
        return replace(self, **{k: v for k, v in changed.items() if v is not None})

    def save(self, path: Path) -> None:
        """Raises UserError where the file cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"machine file {str(path)!r} cannot be written ({error}); choose another with --output FILE"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises UserError for another file."""
        try:
            machine = cls._from(json.loads(Path(path).read_text()))
            check(machine)
            return machine
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"machine file {str(path)!r} cannot be read ({error}); write one with plan --calibrate --output FILE"
            ) from error

    @classmethod
    def _from(cls, saved: dict[str, Any]) -> Self:
        for name in ("link", "internode"):
            saved[name] = Link(**saved[name])
        for name in ("dense", "grouped"):
            saved[name] = {k: tuple(map(tuple, curve)) for k, curve in saved[name].items()}
        saved["tables"] = {
            name: Table(
                tuple((axis, tuple(points)) for axis, points in table["axes"]),
                tuple(table["forward"]),
                tuple(table["backward"]),
            )
            for name, table in saved["tables"].items()
        }
        return cls(**saved)


def check(machine: Machine) -> None:
    """Raise ValueError, which names what is wrong, for a machine of which no plan can be made."""
    kinds = {"str": str, "float": int | float, "int": int, "bool": bool, "dict": dict, "Link": Link}
    for part, name in ((machine, ""), (machine.link, "link."), (machine.internode, "internode.")):
        for one in fields(part):
            value, kind = getattr(part, one.name), str(getattr(one.type, "__name__", one.type))
            _require(kind not in kinds or isinstance(value, kinds[kind]), name + one.name, value)
            if kind in ("float", "int"):
                used = part is not machine or not machine.tables  # beside tables they are 0
                positive = one.name == "ranks_per_node" or (used and one.name in ("bandwidth", "streaming"))
                least = 1e-30 if positive else 0
                _require(not isinstance(value, bool) and least <= value < LARGEST, name + one.name, value)
    for precision, rate in machine.flops.items():
        _require_positive([rate], "flops")
        for what, curves in (("dense", machine.dense), ("grouped", machine.grouped)):
            if not machine.tables:
                _require_rising([x for x, _ in curves[precision]], what)
                _require_positive([y for _, y in curves[precision]], what)
    for name, axes in AXES.items() if machine.tables else ():
        table = machine.tables[name]
        _require(tuple(axis for axis, _ in table.axes) == axes, name, table.axes)
        for _, points in table.axes:
            _require_rising(points, name)
        for times in (table.forward, table.backward):
            _require(len(times) == math.prod(len(points) for _, points in table.axes), name, times)
            _require_positive(times, name)
    _require(isinstance(machine.precision, str | None), "precision", machine.precision)


LARGEST = 1e30


def _require(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r:.60} is invalid")


def _require_positive(values: Iterable[Any], name: str) -> None:
    for value in values:
        _require(isinstance(value, int | float) and 1e-30 < value < LARGEST, name, value)


def _require_rising(points: Sequence[Any], name: str) -> None:
    _require_positive(points, name)
    _require(len(points) > 0 and all(low < high for low, high in pairwise(points)), name, points)
