"""Names in a profile: which part of a layer an operation is of, forward and backward.

Nothing is named, and nothing is added to a layer, but inside of `named()`. Then a layer is computed by the same
operations, each in a range of torch's profiler.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from twolevel.ops.exchange import LOCAL, Exchange, Pending
from twolevel.ops.kernels.base import KernelSet
from twolevel.ops.kernels.normalise import Normaliser
from twolevel.ops.kernels.torch import TorchKernels
from twolevel.ops.schedules import Fused, Overlapped, Schedule

RESTRICTION, EXCHANGE, LOCAL_PART, COARSE, NORM = RANGES = (
    "restriction",
    "exchange",
    "local",
    "coarse",
    "batch norm",
)
# What kernels compute in one pass.
JOINED = ("local and restriction", "local and coarse", "whole layer")

OPERATIONS = {
    "restrict": RESTRICTION,
    "restrict_backward": RESTRICTION,
    "local": LOCAL_PART,
    "local_backward": LOCAL_PART,
    "add_coarse_": COARSE,
    "coarse_input_grad": COARSE,
    "coarse_weight_grad": COARSE,
    "coarse_grads": COARSE,
    "local_and_restriction": JOINED[0],
    "local_and_restriction_backward": JOINED[0],
    "local_and_coarse": JOINED[1],
    "whole": JOINED[2],
    "whole_backward": JOINED[2],
}
# Those that torch's kernels compute by their other operations, whose ranges say more.
COMPOSED = ("whole", "whole_backward", "local_and_coarse")
NORMALISES: dict[str, str] = dict.fromkeys(
    ("moments", "apply", "sums", "input_grad", "forward", "backward"), NORM
)

_naming = False


@contextmanager
def named(*, norms: bool = True) -> Iterator[None]:
    """Name the parts of the layers whose forward runs inside, and of their backward.

    Without `norms` not those batch norms that torch computes: a graph of torch.compile would be compiled again.
    """
    global _naming
    before, _naming = _naming, True
    norm: Any = nn.BatchNorm2d
    forward = norm.forward
    if norms:
        norm.forward = _name_norm(forward)
    try:
        yield
    finally:
        _naming = before
        norm.forward = forward


def in_ranges(schedule: Schedule) -> Schedule:
    """The schedule, or inside of `named` one of the same operations in ranges."""
    if not _naming or not isinstance(schedule, Overlapped | Fused):
        return schedule
    kernels: Any = _Named(schedule.kernels, OPERATIONS)
    in_range: Any = _NamedSchedule(type(schedule)(kernels))
    return in_range


def normaliser_in_ranges(kernels: Normaliser) -> Normaliser:
    """The same of batch norm's kernels."""
    in_range: Any = _Named(kernels, NORMALISES) if _naming else kernels
    return in_range


def exchange_in_ranges(exchange: Exchange) -> Exchange:
    """The same of an exchange, whose start and wait have a range each."""
    return _NamedExchange(exchange) if _naming and exchange is not LOCAL else exchange


def _name_norm(
    forward: Callable[[nn.BatchNorm2d, Tensor], Tensor],
) -> Callable[[nn.BatchNorm2d, Tensor], Tensor]:
    """The forward of torch's own batch norm in a range, and what autograd computes for its backward."""

    @wraps(forward)
    def in_range(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        with record_function(NORM):
            o = forward(norm, x)
        if o.grad_fn is not None:
            _name_node(o.grad_fn)
        return o

    return in_range


def _name_node(node: torch.autograd.graph.Node) -> None:
    entered: list[record_function] = []

    def enter(_: Any) -> None:
        entered.append(record_function(NORM))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    node.register_prehook(enter)
    node.register_hook(leave)


class _Named:
    """Kernels of which some operations run in a range; all else is that of the kernels."""

    def __init__(self, kernels: KernelSet | Normaliser, names: dict[str, str]):
        self._kernels, self._names = kernels, names

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._kernels, attribute)
        name = self._names.get(attribute)
        if name is None:
            return found
        if attribute in COMPOSED and found.__func__ is getattr(TorchKernels, attribute):
            return partial(found.__func__, self)

        @wraps(found)
        def in_range(*args: Any) -> Any:
            with record_function(name):
                return found(*args)

        return in_range


class _NamedSchedule:
    def __init__(self, schedule: Any):
        self._schedule = schedule

    def forward(self, *args: Any) -> Any:
        *tensors, exchange = args
        return self._schedule.forward(*tensors, _always(exchange))

    def backward(self, *args: Any) -> Any:
        *tensors, exchange, wanted = args
        return self._schedule.backward(*tensors, _always(exchange), wanted)


def _always(exchange: Exchange) -> Exchange:
    """A backward may come when `named` has ended; its forward was named."""
    return exchange if exchange is LOCAL else _NamedExchange(exchange)


class _NamedExchange:
    def __init__(self, exchange: Exchange):
        self.ranks, self.key, self._exchange = exchange.ranks, exchange.key, exchange

    def gather(self, own: Tensor) -> Pending:
        with record_function(EXCHANGE):
            return _NamedPending(self._exchange.gather(own))

    def scatter_sum(self, parts: Tensor) -> Pending:
        with record_function(EXCHANGE):
            return _NamedPending(self._exchange.scatter_sum(parts))

    def sum(self, own: Tensor) -> Pending:
        with record_function(EXCHANGE):
            return _NamedPending(self._exchange.sum(own))


class _NamedPending:
    def __init__(self, pending: Pending):
        self._pending = pending

    def wait(self) -> Tensor:
        with record_function(EXCHANGE):
            return self._pending.wait()
