"""The exchange is in flight under the local convolution, forward and backward: an order of events, no clock."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from twolevel.distributed import parallelize
from twolevel.nn import BalancedConv2d, TwoLevelConv2d
from twolevel.nn.base import ShardedConv2d
from twolevel.ops import LOCAL
from twolevel.ops.kernels import native
from twolevel.ops.kernels.native import two_level

GROUPS = 4
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_"}
FORMATS = [torch.contiguous_format, torch.channels_last]

# Kernels; channels a group, n/G and m/G; and the events before the exchange starts and after it was waited for, which
# are the restriction's.
GROUPED = ("grouped", 3, 5, torch.contiguous_format, ["restriction"], ["restriction gradients"])
DEPTHWISE = (
    "depthwise",
    3,
    5,
    torch.channels_last,
    ["restriction", "product"],
    ["product", "restriction gradients"],
)
PRODUCT = ("products", 9, 5, torch.channels_last, ["product"], ["product", "product"])
CASES = [GROUPED, DEPTHWISE, PRODUCT]
IDS = [case[0] for case in CASES]


def forward_order(restriction, crossing=()):
    return [*restriction, "gather started", *crossing, "local", "gather waited", "product"]


def backward_order(restriction, crossing=()):
    before = ["product", "scatter started", *crossing, "product", "local gradients", "scatter waited"]
    return [*before, *restriction]


class Events(TorchDispatchMode):
    """Lists the convolutions, the matrix products and the collectives that run, each by what it is for."""

    def __init__(self, conv: ShardedConv2d):
        super().__init__()
        self.events: list[str] = []
        self.weights = {part.weight.data_ptr(): name for name, part in conv.named_children()}
        self.depthwise = (conv.local.in_channels, 1, 3, 3)

    def _part(self, weight: torch.Tensor) -> str:
        other = "restriction" if tuple(weight.shape) == self.depthwise else "another"
        return self.weights.get(weight.data_ptr(), other)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::")
        if name == "convolution":
            self.events.append(self._part(args[1]))
        elif name == "convolution_backward":
            self.events.append(f"{self._part(args[2])} gradients")
        elif name in PRODUCTS:
            self.events.append("product")
        elif name.startswith("c10d::"):
            self.events.append(name)
        return op(*args, **(kwargs or {}))


class Logged:
    """An exchange that says when a collective starts, and when its result is waited for."""

    def __init__(self, exchange, events: list[str]):
        self.exchange, self.events, self.ranks = exchange, events, exchange.ranks

    def _start(self, name, start, tensor):
        self.events.append(f"{name} started")
        pending, events = start(tensor), self.events

        class Pending:
            def wait(self):
                events.append(f"{name} waited")
                return pending.wait()

        return Pending()

    def gather(self, own):
        return self._start("gather", self.exchange.gather, own)

    def scatter_sum(self, parts):
        return self._start("scatter", self.exchange.scatter_sum, parts)

    def sum(self, own):
        return self._start("sum", self.exchange.sum, own)


def events_of(conv, x):
    """What happens in forward, and what in backward."""
    log = Events(conv)
    conv.exchange = Logged(conv.exchange, log.events)
    with log:
        y = conv(x.requires_grad_())
        forward = log.events[:]
        log.events.clear()
        y.sum().backward()
    return forward, log.events


def make(schedule, case):
    kernels, n, m, memory_format, *_ = case
    conv = TwoLevelConv2d(
        GROUPS * n, GROUPS * m, 3, padding=1, groups=GROUPS, schedule=schedule, kernels=kernels
    )
    return conv, torch.randn(2, GROUPS * n, 6, 6).to(memory_format=memory_format)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("schedule", ["auto", "overlapped"])
def test_exchange_runs_under_the_local_convolution(schedule, case):
    forward, backward = events_of(*make(schedule, case))
    assert forward == forward_order(case[4])
    assert backward == backward_order(case[5])


def spied(call, events):
    """A call of C kernels, of which torch sees nothing, that says which parts of a layer it is for."""
    signature = inspect.signature(call)

    def run(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        parts = [part for part in ("local", "restriction", "coarse") if given.get(part) is not None]
        events.append(" and ".join(parts) or "gradient of coarse")
        return call(*args, **kwargs)

    return run


@pytest.mark.skipif(native.available() is not None, reason=native.available() or "")
@pytest.mark.parametrize(
    ("schedule", "forward", "backward"),
    [
        (
            "overlapped",
            ["restriction", "gather started", "local", "gather waited", "coarse"],
            ["coarse", "scatter started", "gradient of coarse", "local", "scatter waited", "restriction"],
        ),
        (
            "fused",
            ["restriction", "gather started", "gather waited", "local and coarse"],
            ["coarse", "scatter started", "scatter waited", "local and restriction"],
        ),
    ],
)
def test_order_of_the_c_kernels(monkeypatch, schedule, forward, backward):
    conv, x = make(schedule, ("native", *GROUPED[1:]))
    log = Events(conv)
    conv.exchange = Logged(conv.exchange, log.events)
    for name in ("forward", "backward"):
        monkeypatch.setattr(two_level, name, spied(getattr(two_level, name), log.events))
    y = conv(x.requires_grad_())
    assert log.events == forward
    log.events.clear()
    y.sum().backward()
    assert log.events == backward


def test_fused_exposes_the_exchange():
    """The events do tell schedules apart: no convolution runs between start and wait here."""
    forward, backward = events_of(*make("fused", GROUPED))
    assert forward == ["another", "gather started", "gather waited", "product"]
    assert backward == ["product", "scatter started", "product", "scatter waited", "another gradients"]


def order_on_ranks(case):
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "group"))
    conv, x = make("auto", case)
    parallelize(conv, mesh)
    assert conv.exchange is not LOCAL
    return events_of(conv, x.chunk(ranks, 1)[dist.get_rank()].clone(memory_format=case[3]))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_collectives_of_ranks_run_under_the_local_convolution(pool, case):
    for forward, backward in pool.run(order_on_ranks, case, ranks=2):
        assert forward == forward_order(case[4], ["c10d::_allgather_base_"])
        assert backward == backward_order(case[5], ["c10d::alltoall_base_"])


def balanced_order_on_ranks(memory_format):
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "group"))
    conv = parallelize(BalancedConv2d(GROUPS * 3, GROUPS * 5, 3, padding=1, groups=GROUPS), mesh)
    return events_of(conv, torch.randn(2, GROUPS * 3 // ranks, 6, 6).to(memory_format=memory_format))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_mean_is_summed_under_the_local_convolution_and_its_gradient_under_the_gradients(
    pool, memory_format
):
    start = ["sum started", "c10d::allreduce_"]
    for forward, backward in pool.run(balanced_order_on_ranks, memory_format, ranks=2):
        assert forward == [*start, "local", "sum waited", "mean"]
        assert backward == ["mean gradients", *start, "local gradients", "mean gradients", "sum waited"]
