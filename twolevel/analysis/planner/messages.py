"""Seconds of collectives by the alpha-beta model, and how much of them a computation hides."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from twolevel.analysis.planner.machine import Link, Machine
from twolevel.analysis.traffic import Collective


@dataclass(frozen=True)
class Message(Collective):
    """One collective of a step on one rank, with its seconds on the link and those that no computation hides."""

    seconds: float
    exposed: float = 0.0


def message(collective: Collective, seconds: float, *, exposed: float = 0.0) -> Message:
    """The collective with its times."""
    return Message(collective.kind, collective.bytes_in, collective.bytes_sent, seconds, exposed)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """P ranks that take part in a collective: `per_node` of them on each of `nodes` nodes.

    `sharing` such axes cross between the same nodes at once and share the link between them.
    """

    ranks: int
    per_node: int
    link: Link
    internode: Link
    sharing: int = 1

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.per_node)

    @property
    def slowest(self) -> tuple[float, float]:
        """(latency, bytes/s) of a step of a ring over all ranks: as slow as its slowest link."""
        if self.nodes == 1:
            return self.link.latency, self.link.bandwidth
        bandwidth = min(self.link.bandwidth, self.internode.bandwidth / self.sharing)
        return max(self.link.latency, self.internode.latency), bandwidth


def axes(machine: Machine, data: int, inner: int) -> tuple[Axis, Axis]:
    """The (data, inner) axes of a mesh; inner ranks follow each other, so that they share a node where they fit."""
    inside = min(inner, machine.ranks_per_node)
    per_node = max(1, machine.ranks_per_node // inner)
    crossing = min(inside, machine.ranks_per_node)
    link, internode = machine.link, machine.internode
    return (
        Axis(ranks=data, per_node=min(data, per_node), link=link, internode=internode, sharing=crossing),
        Axis(ranks=inner, per_node=inside, link=link, internode=internode),
    )


def all_gather(axis: Axis, whole: float, *, two_level: bool = False) -> float:
    """Seconds of an all-gather whose result is `whole` bytes.

        ring        (P - 1) (alpha + whole / (P beta))
        two levels  (N - 1) (alpha_e + whole / (N beta_e))  between N nodes, each rank with its like on the others,
                    then (r - 1) (alpha_i + whole / (r beta_i))  within a node of r ranks

    A reduce-scatter takes the same, in reverse.
    """
    if axis.ranks == 1:
        return 0.0
    if two_level and axis.nodes > 1 and axis.per_node > 1:
        nodes, inside = axis.nodes, axis.per_node
        # All r ranks of a node send at once, each 1/r of what leaves it: together `whole / N` a step.
        between = (nodes - 1) * (
            axis.internode.latency + whole / nodes * axis.sharing / axis.internode.bandwidth
        )
        return between + (inside - 1) * (axis.link.latency + whole / inside / axis.link.bandwidth)
    latency, bandwidth = axis.slowest
    return (axis.ranks - 1) * (latency + whole / axis.ranks / bandwidth)


def all_reduce(axis: Axis, size: float) -> float:
    """Seconds of an all-reduce of `size` bytes: the faster of a ring and a tree.

    ring  2 (P - 1) (alpha + size / (P beta))        tree  2 ceil(log2 P) (alpha + size / beta)
    """
    if axis.ranks == 1:
        return 0.0
    latency, bandwidth = axis.slowest
    ring = 2 * (axis.ranks - 1) * (latency + size / axis.ranks / bandwidth)
    return min(ring, 2 * math.ceil(math.log2(axis.ranks)) * (latency + size / bandwidth))


def broadcast(axis: Axis, size: float) -> float:
    """Seconds of a broadcast of `size` bytes by a tree: ceil(log2 P) (alpha + size / beta)."""
    if axis.ranks == 1:
        return 0.0
    latency, bandwidth = axis.slowest
    return math.ceil(math.log2(axis.ranks)) * (latency + size / bandwidth)


def send(axis: Axis, size: float) -> float:
    """Seconds of a message of `size` bytes to the next rank: alpha + size / beta, of the slowest link on the way."""
    latency, bandwidth = axis.slowest
    return latency + size / bandwidth


def drain(jobs: Iterable[tuple[float, float]], until: float) -> float:
    """Seconds after `until` at which a link is done with jobs (ready at, seconds), one after the other."""
    free = 0.0
    for ready, seconds in jobs:
        free = max(free, ready) + seconds
    return max(0.0, free - until)


def buckets(sizes: list[int], first: int = 1 << 20, limit: int = 25 << 20) -> list[list[int]]:
    """How DDP puts gradients together: indices of `sizes` (bytes, in the order in which they become ready).

    A bucket closes once it holds `limit` bytes (the first: `first`), those of DistributedDataParallel.
    """
    closed: list[list[int]] = []
    open_: list[int] = []
    filled = 0
    for index, size in enumerate(sizes):
        open_.append(index)
        filled += size
        if filled >= (limit if closed else first):
            closed.append(open_)
            open_, filled = [], 0
    return closed + ([open_] if open_ else [])
