"""What a pass keeps so that it can be computed again: what ranks sent each other, so that it is sent once."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

from twolevel.ops.exchange import Done, Exchange, Pending
from twolevel.ops.geometry import output_size
from twolevel.ops.kernels.base import Gradients
from twolevel.ops.normalise import Replicas
from twolevel.ops.schedules import Schedule

_tape: ContextVar["Tape | None"] = ContextVar("tape", default=None)


class Tape:
    """Results in their order: kept while the pass is computed under `recording`, given under `replaying`.

    `unneeded` are weights C of two-level convolutions whose output nothing needs when the pass is computed again.
    """

    def __init__(self, unneeded: Collection[Tensor] = ()):
        self._kept: list[Tensor] = []
        self._next: int | None = None  # of those that are given; None: they are kept
        self._unneeded = {id(weight) for weight in unneeded}

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._kept.clear()
        yield from self._as_current(None)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        yield from self._as_current(0)

    def _as_current(self, first: int | None) -> Iterator[None]:
        self._next = first
        token = _tape.set(self)
        try:
            yield
        finally:
            _tape.reset(token)

    @property
    def replays(self) -> bool:
        return self._next is not None

    def skips(self, coarse: Tensor) -> bool:
        """Whether the output of the convolution with this weight C is not needed now."""
        return self.replays and id(coarse) in self._unneeded

    def keep(self, result: Tensor) -> Tensor:
        self._kept.append(result)
        return result

    def take(self) -> Tensor:
        assert self._next is not None
        self._next += 1
        return self._kept[self._next - 1]


def current() -> Tape | None:
    """The tape under whose `recording` or `replaying` this is."""
    return _tape.get()


class _Keeping(NamedTuple):
    pending: Pending
    tape: Tape

    def wait(self) -> Tensor:
        return self.tape.keep(self.pending.wait())


class TapedExchange:
    """An exchange whose forward results are kept on a tape, or come from there; its others pass."""

    def __init__(self, exchange: Exchange, tape: Tape):
        self.ranks, self.key = exchange.ranks, exchange.key
        self._exchange, self._tape = exchange, tape

    def gather(self, own: Tensor) -> Pending:
        return self._once(lambda: self._exchange.gather(own))

    def sum(self, own: Tensor) -> Pending:
        return self._once(lambda: self._exchange.sum(own))

    def scatter_sum(self, parts: Tensor) -> Pending:
        return self._exchange.scatter_sum(parts)

    def _once(self, start: Callable[[], Pending]) -> Pending:
        if current() is not self._tape:  # the gradient of a sum is one too
            return start()
        return Done(self._tape.take()) if self._tape.replays else _Keeping(start(), self._tape)


class TapedReplicas:
    """The same of the ranks that share batch norm's statistics."""

    def __init__(self, replicas: Replicas, tape: Tape):
        self.ranks, self._replicas, self._tape = replicas.ranks, replicas, tape

    def all_gather(self, own: Tensor) -> Tensor:
        return self._tape.take() if self._tape.replays else self._tape.keep(self._replicas.all_gather(own))

    def all_reduce_(self, tensor: Tensor) -> None:
        self._replicas.all_reduce_(tensor)


class TapedSchedule:
    """A schedule of a two-level convolution whose representatives z are kept on a tape, or come from there.

    With `skip` y is left as memory happens to be.
    """

    def __init__(self, schedule: Schedule, tape: Tape, *, skip: bool):
        self._schedule, self._tape, self._skip = schedule, tape, skip

    def forward(self, x, local, restriction, coarse, geometry, exchange) -> tuple[Tensor, Tensor]:
        if self._skip:
            height, width = output_size(x.shape[2:], local.shape[2:], geometry)
            return x.new_empty(len(x), len(local), height, width), self._tape.take()
        weights = (local, restriction, coarse)
        if exchange.ranks > 1:  # z is what it gathers
            return self._schedule.forward(x, *weights, geometry, TapedExchange(exchange, self._tape))
        y, z = self._schedule.forward(x, *weights, geometry, exchange)
        return y, self._tape.take() if self._tape.replays else self._tape.keep(z)

    def backward(self, *args) -> Gradients:
        return self._schedule.backward(*args)
