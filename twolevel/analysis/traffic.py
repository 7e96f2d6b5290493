"""Bytes that a collective sends: the one place, for `count` and for the planner."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "broadcast", "send"]


@dataclass(frozen=True)
class Collective:
    """One collective of a training step over an axis, as one of its P ranks sees it.

    `bytes_in` is what the rank passes to it. `bytes_sent` is what the rank sends by the bandwidth-optimal (ring)
    algorithm, and as much as it receives.
    """

    kind: Kind
    bytes_in: int
    bytes_sent: float


def collective(kind: Kind, size: int, *, ranks: int) -> Collective:
    """A collective of P = `ranks` ranks whose tensor has `size` bytes when it is complete.

    | kind            | bytes in | bytes sent       |
    |-----------------|----------|------------------|
    | all-gather      | size / P | (P - 1) / P size |
    | reduce-scatter  | size     | (P - 1) / P size |
    | all-reduce      | size     | twice that       |
    | broadcast, send | size     | size             |
    """
    others = (ranks - 1) / ranks
    match kind:
        case "all-gather":
            return Collective(kind, size // ranks, others * size)
        case "reduce-scatter":
            return Collective(kind, size, others * size)
        case "all-reduce":
            return Collective(kind, size, 2 * others * size)
        case "broadcast" | "send":
            return Collective(kind, size, size)


def representatives_exchange(
    *, batch: int, representatives: int, pixels: int, itemsize: int, ranks: int
) -> tuple[Collective, Collective]:
    """The gather of all representatives of a two-level convolution, and the reduce-scatter of their gradients."""
    size = batch * representatives * pixels * itemsize
    return collective("all-gather", size, ranks=ranks), collective("reduce-scatter", size, ranks=ranks)


def mean_exchange(
    *, batch: int, channels: int, pixels: int, itemsize: int, ranks: int
) -> tuple[Collective, Collective]:
    """The sum over ranks of the mean of groups of a balanced convolution, and that of its gradient."""
    size = batch * channels * pixels * itemsize
    return collective("all-reduce", size, ranks=ranks), collective("all-reduce", size, ranks=ranks)


def logits_sum(*, batch: int, classes: int, itemsize: int, ranks: int) -> Collective:
    """The sum of the partial logits of a classifier that is split by input feature, in float32 at least."""
    return collective("all-reduce", batch * classes * max(itemsize, 4), ranks=ranks)
