"""Everything that ranks of the `group` axis send each other, each collective beside its gradient.

    where            forward                          backward
    representatives  all-gather  [G/P] -> [G]         reduce-scatter with SUM  [G] -> [G/P]
    mean of groups   all-reduce  sum of P parts       all-reduce with SUM
    logits           all-reduce  sum of P parts       identity
    image            identity                         all-reduce (only where the image needs a gradient)

The pairs are conjugate: the ranks' uses of z and of the mean differ, so their gradient is a sum; all ranks
compute one loss from the same logits, so its gradient is already the same everywhere and must not be summed again.
"""

from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twolevel.ops.exchange import register, registered

# Newer versions of torch warn at the names that are the only ones in older versions.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _started(work: dist.Work | None) -> dist.Work:
    """What a collective of a group returns to the ranks that are in it."""
    assert work is not None
    return work


class _InFlight(NamedTuple):
    work: dist.Work
    result: Tensor
    axis: "MeshAxis"
    what: str

    def wait(self) -> Tensor:
        began = perf_counter()
        self.work.wait()
        self.axis.waited += perf_counter() - began
        return self.result


class _Unsummed(NamedTuple):
    work: dist.Work
    parts: Tensor  # one of every rank
    axis: "MeshAxis"
    what: str = "reduce-scatter"

    def wait(self) -> Tensor:
        began = perf_counter()
        self.work.wait()
        self.axis.waited += perf_counter() - began
        return self.parts.unflatten(0, (self.axis.ranks, -1)).sum(0)


class MeshAxis:
    """The ranks along one axis of the mesh, in order; the `ops.Exchange` of the layers along `group`."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.ranks = group.size()
        self.key = register(self)
        self.waited = 0.0
        """Seconds in all that this process waited for others; on a GPU its stream waits instead, which is not timed."""

    def gather(self, own: Tensor) -> _InFlight:
        """Start the all-gather `[G/P, ...] -> [G, ...]`."""
        result = own.new_empty(self.ranks * len(own), *own.shape[1:])
        return _InFlight(
            _started(all_gather_single(result, own, self.group, async_op=True)), result, self, "all-gather"
        )

    def scatter_sum(self, parts: Tensor) -> _InFlight | _Unsummed:
        """Start the reduce-scatter `[G, ...] -> [G/P, ...]`."""
        refuse_second_derivative(parts)
        if parts.device.type == "cpu" and dist.get_backend(self.group) == "gloo":
            # Gloo's own sends about as much as an all-reduce: of the parts each rank gets those that it adds up.
            received = torch.empty_like(parts)
            work = dist.all_to_all_single(received, parts, group=self.group, async_op=True)
            return _Unsummed(_started(work), received, self)
        result = parts.new_empty(len(parts) // self.ranks, *parts.shape[1:])
        work = reduce_scatter_single(result, parts, dist.ReduceOp.SUM, self.group, async_op=True)
        return _InFlight(_started(work), result, self, "reduce-scatter")

    def sum(self, own: Tensor) -> _InFlight:
        """Start the sum over ranks, in the memory of `own`, which is contiguous."""
        refuse_second_derivative(own)
        work = dist.all_reduce(own, dist.ReduceOp.SUM, self.group, async_op=True)
        return _InFlight(_started(work), own, self, "all-reduce")

    def sum_logits(self, partial: Tensor) -> Tensor:
        """The sum over ranks of `[B, classes]`, the same on each; its gradient passes unchanged."""
        if torch.compiler.is_compiling():
            return _sum_logits(partial, self.key)
        return _SumForward.apply(partial, self)

    def share_input(self, x: Tensor) -> Tensor:
        """x itself, of which each rank computes its own output channels: its gradient is summed."""
        return _SumBackward.apply(x, self)

    def all_gather(self, own: Tensor) -> Tensor:
        """The parts of all ranks, `[n] -> [P, n]`, without a gradient."""
        every = own.new_empty(self.ranks * len(own))
        began = perf_counter()
        all_gather_single(every, own, self.group)
        self.waited += perf_counter() - began
        return every.view(self.ranks, len(own))

    def all_reduce_(self, tensor: Tensor) -> None:
        """The sum over ranks, in place and without a gradient; `tensor` is contiguous."""
        refuse_second_derivative(tensor)
        began = perf_counter()
        dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group)
        self.waited += perf_counter() - began

    def __deepcopy__(self, memo: dict[int, Any]) -> "MeshAxis":
        return self  # copies of a network, such as its moving average, live on the same ranks


def axes_of(network: nn.Module) -> list[MeshAxis]:
    """Every axis, once, along which layers of a network exchange something."""
    found = {id(v): v for layer in network.modules() for v in vars(layer).values() if isinstance(v, MeshAxis)}
    return [*found.values()]


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        axis.all_reduce_(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _same_on_each_rank(grad), None


@torch.library.custom_op("twolevel::sum_logits", mutates_args=())
def _sum_logits(partial: Tensor, axis: str) -> Tensor:
    """`_SumForward` as one operation of a compiled graph, which would break at it."""
    total = partial.clone(memory_format=torch.contiguous_format)
    exchange = registered(axis)
    assert isinstance(exchange, MeshAxis)
    exchange.all_reduce_(total)
    return total


@_sum_logits.register_fake
def _(partial: Tensor, axis: str) -> Tensor:
    return torch.empty_like(partial, memory_format=torch.contiguous_format)


_sum_logits.register_autograd(lambda ctx, grad: (_same_on_each_rank(grad), None))


def _same_on_each_rank(grad: Tensor) -> Tensor:
    """The gradient of the logits, of one loss on all ranks. A gradient of it is not: each rank has its own share."""
    refuse_second_derivative(grad)
    return grad


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative(grad)
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.axis.all_reduce_(total)
        return total, None


def refuse_second_derivative(gradient: Tensor) -> None:
    """Collectives of torch.distributed pass no gradient: a derivative of one taken here would be wrong."""
    if torch.is_grad_enabled() and gradient.requires_grad:
        raise NotImplementedError(
            "second derivatives across ranks are not supported; take them on one process"
        )
