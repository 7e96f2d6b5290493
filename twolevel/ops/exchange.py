"""What layers ask of the other ranks: P of them, each holding G/P consecutive groups."""

import itertools
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from torch import Tensor

# An operator of a compiled graph takes tensors and plain values only, so exchanges are handed over by key.
_registered: WeakValueDictionary[str, "Exchange"] = WeakValueDictionary()
_numbers = itertools.count()


def register(exchange: "Exchange") -> str:
    """A key by which `registered` finds this exchange for as long as it lives."""
    key = f"exchange {next(_numbers)}"
    _registered[key] = exchange
    return key


def registered(key: str) -> "Exchange":
    return _registered[key]


class Pending(Protocol):
    """A collective in flight."""

    def wait(self) -> Tensor:
        """Block (or make the current stream wait) until the result is there, and return it."""
        ...


class Exchange(Protocol):
    """What carries maps between the ranks of a group axis. Only compiled graphs need the key."""

    ranks: int
    key: str

    def gather(self, own: Tensor) -> Pending:
        """Start `[G/P, B, H, W] -> [G, B, H, W]`, the parts of all ranks in order of rank."""
        ...

    def scatter_sum(self, parts: Tensor) -> Pending:
        """Start `[G, B, H, W] -> [G/P, B, H, W]`, this rank's part of the sum over ranks."""
        ...

    def sum(self, own: Tensor) -> Pending:
        """Start the sum over ranks, whole on each. `own` is contiguous, and its memory may be that of the result."""
        ...


class Done(NamedTuple):
    """A result that is there already."""

    value: Tensor

    def wait(self) -> Tensor:
        return self.value


class _Local:
    """The exchange of one rank that holds every group: nothing is sent."""

    ranks = 1

    def __init__(self):
        self.key = register(self)

    def gather(self, own: Tensor) -> Pending:
        return Done(own)

    def scatter_sum(self, parts: Tensor) -> Pending:
        return Done(parts)

    def sum(self, own: Tensor) -> Pending:
        return Done(own)

    def __reduce__(self) -> str:
        return "LOCAL"  # a copy, or what is read from a file, is the one that there is


LOCAL: Exchange = _Local()


class Copies:
    """The exchange of one of `ranks` ranks with itself alone: results of the right shape, and nothing is sent."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.key = register(self)

    def gather(self, own: Tensor) -> Pending:
        return Done(own.repeat(self.ranks, *[1] * (own.dim() - 1)))

    def scatter_sum(self, parts: Tensor) -> Pending:
        return Done(parts[: len(parts) // self.ranks])

    def sum(self, own: Tensor) -> Pending:
        return Done(own)
