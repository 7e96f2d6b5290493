"""The cost model's memory and messages against what real networks and ranks hold, keep for backward and send."""

import weakref
from collections import Counter
from inspect import signature

import pytest
import torch
from by_hand import SIMPLE, workload
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.collectives import counting
from twolevel import models
from twolevel.analysis import count
from twolevel.analysis.planner.costs.base import Setting
from twolevel.analysis.planner.costs.channel import channel_cost
from twolevel.analysis.planner.costs.fsdp import fsdp_cost
from twolevel.analysis.planner.costs.group import group_cost
from twolevel.analysis.planner.costs.pipeline import cut
from twolevel.analysis.planner.footprint import Part, buffers, rank_parameters
from twolevel.analysis.planner.tracing import trace
from twolevel.distributed import parallelize, replicate
from twolevel.distributed.strategies.channel import split_channels
from twolevel.distributed.strategies.fsdp import shard_parameters
from twolevel.distributed.strategies.stages import cut_stages
from twolevel.errors import UserError
from twolevel.nn import recompute_blocks
from twolevel.nn.structure import ACTIVATIONS

# Two-level, with three representatives a group.
MORE = "gc2l of 3"
NETWORKS = [
    ("wrn-10-2", "sc", 1, 16),
    ("wrn-10-2", "gc", 4, 16),
    ("wrn-16-1", "gc2l", 4, 16),
    ("wrn-16-1", MORE, 4, 16),
    ("resnet18", "sc", 1, 64),
]
NETWORKS += [
    ("mobilenetv2-cifar", "gc2l", 4, 32),
    ("condensenet-50", "sc", 1, 16),
    ("resnext50", "gc", 32, 64),
]


def options_of(conv, groups):
    options = {"conv": conv, "groups": groups}
    return {"conv": "gc2l", "groups": groups, "representatives": 3} if conv == MORE else options


def make(name, conv, groups):
    return models.create(name, **options_of(conv, groups)).to(memory_format=torch.channels_last)


def batch_of(batch, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.arange(batch) % 10


def saved_bytes(network, images, labels, autocast=False):
    """Bytes of the storages that autograd saves, without parameters and buffers."""
    skip = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    seen, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no other takes its place
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        F.cross_entropy(network(images), labels)
    return sum(seen.values())


class Live(TorchDispatchMode):
    """The most bytes of storages alive at once that operations under this mode made."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_iter(args) if isinstance(t, torch.Tensor)}
        result = op(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.alive | given:
                self.alive.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._drop, storage.data_ptr(), storage.nbytes())
        return result

    def _drop(self, pointer, size):
        self.alive.discard(pointer)
        self.now -= size


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("name", "conv", "groups", "size"), NETWORKS)
def test_activation_bytes_are_what_autograd_saves(name, conv, groups, size, precision):
    network = make(name, conv, groups)
    part = Part(traced := trace(network, (3, size, size)), traced.layers, 4, 1, precision)
    assert saved_bytes(network, *batch_of(4, size), autocast=precision == "bf16") == part.activations()


# Without log_sigmoid, which keeps one more tensor on CPUs than on GPUs.
@pytest.mark.parametrize("module", [m for name, m in ACTIVATIONS.items() if name != "logsigmoid"])
def test_an_activation_keeps_what_autograd_saves_of_it(module):
    able = [False, True] if "inplace" in signature(module).parameters else [False]
    values = {nn.Threshold: (0.1, 0.2)}.get(module, ())
    for in_place in able:
        activation = module(*values, **({"inplace": True} if in_place else {}))
        # Between what keeps nothing, or the classifier's input: one map more or less is seen.
        network = nn.Sequential(
            nn.BatchNorm2d(3), activation, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)
        )
        part = Part(traced := trace(network, (3, 8, 8)), traced.layers, 4)
        assert [layer.kind for layer in traced.layers][1] == "activation"
        assert saved_bytes(network, *batch_of(4, 8)) == part.activations(), in_place


@pytest.mark.parametrize(("name", "conv", "groups", "size"), NETWORKS)
def test_peak_of_forward_and_backward_within_4_percent_of_live_tensors(name, conv, groups, size):
    """Off by temporary tensors of single operations, in the smallest networks the largest share."""
    network, (images, labels) = make(name, conv, groups), batch_of(4, size)
    F.cross_entropy(network(images), labels)  # what is built at the first call stays
    traced = trace(network, (3, size, size))
    with Live() as live:
        F.cross_entropy(network(images), labels).backward()
    predicted = (
        Part(traced, traced.layers, 4).peak() - images.nbytes - labels.nbytes
    )  # these were there before
    assert predicted == pytest.approx(live.most, rel=0.04)


@pytest.mark.parametrize(
    ("name", "conv", "groups", "size"),
    [
        ("wrn-28-1", "sc", 1, 16),
        ("wrn-28-1", "gc2l", 4, 16),
        ("wrn-28-2", MORE, 4, 16),
        ("resnet18", "sc", 1, 64),
    ],
)
def test_blocks_computed_again_hold_what_the_model_says(name, conv, groups, size):
    network, (images, labels) = make(name, conv, groups).train(), batch_of(16, size)
    recompute_blocks(network)
    traced = trace(make(name, conv, groups), (3, size, size))
    for _ in range(2):  # what is built at the first call stays
        with Live() as live:
            F.cross_entropy(network(images), labels).backward()
        network.zero_grad()
    part = Part(traced, traced.layers, 16, recompute=True)
    predicted = part.peak() - images.nbytes - labels.nbytes
    # Temporary tensors of single operations are a larger share of what is left.
    assert predicted == pytest.approx(live.most, rel=0.08)
    assert part.activations() < 0.6 * Part(traced, traced.layers, 16).activations()


def test_what_nothing_needs_is_not_computed_again():
    traced = trace(make("wrn-10-1", "gc2l", 4), (3, 16, 16))
    again = Part(traced, traced.layers, 16, recompute=True).again()
    convolutions = sorted(layer.name for layer in again if layer.kind in ("conv", "two-level"))
    assert convolutions == ["stages.0.0.conv1", "stages.1.0.conv1", "stages.2.0.conv1"]
    assert Part(traced, traced.layers, 16).again() == set()


def test_a_step_whose_blocks_are_computed_again_takes_their_forward_longer():
    traced = trace(make("wrn-10-1", "sc", 1), (3, 16, 16))
    stored, again = (
        group_cost(traced, Setting(SIMPLE, 16, recompute=choice), "sc", data=1, group=1)
        for choice in (False, True)
    )
    part = Part(traced, traced.layers, 16, recompute=True)
    timing = Setting(SIMPLE, 16).timing
    added = sum(timing(traced.work(layer, 16)).forward for layer in part.again())
    assert again.compute - stored.compute == pytest.approx(added) and added > 0
    assert again.peak_bytes < stored.peak_bytes and again.messages == stored.messages


@pytest.mark.parametrize(("conv", "groups"), [("gc2l", 4), ("gc2l", 8), (MORE, 4), ("gc", 4)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rank_of_a_group_holds_the_counted_parameters(conv, groups, ranks):
    with torch.device("meta"):
        counted = count(models.create("wrn-10-2", **options_of(conv, groups)), (3, 16, 16), ranks=ranks)
    layers = workload("wrn-10-2", **options_of(conv, groups)).layers
    assert sum(rank_parameters(layer, ranks) for layer in layers) == counted.held


def _step(model, images, labels):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    F.cross_entropy(model(images), labels).backward()
    optimiser.step()
    return optimiser


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def ranks_hold(strategy, name, conv, groups, data, inner, batch):
    """Bytes of a rank's parameters, gradients, momentum, buffers and saved tensors; collectives of a third step."""
    mesh = init_device_mesh("cpu", (data, inner), mesh_dim_names=("data", "group"))
    network, (images, labels) = models.create(name, **options_of(conv, groups)), batch_of(batch // data, 16)
    if strategy != "fsdp":  # which takes contiguous parameters alone
        network = network.to(memory_format=torch.channels_last)
    if strategy == "channel":
        network = split_channels(network, mesh)
    elif strategy == "fsdp":
        shard_parameters(network, mesh)
    else:
        parallelize(network, mesh)
    saved = None if strategy == "fsdp" else saved_bytes(network, images, labels)
    model = replicate(network, mesh) if strategy != "fsdp" else network
    for _ in range(2):  # DDP puts its buckets together anew after the first
        optimiser = _step(model, images, labels)
        optimiser.zero_grad()
    with counting() as seen:
        F.cross_entropy(model(images), labels).backward()
    parameters = [*network.parameters()]
    return {
        "parameters": sum(local(p).nbytes for p in parameters),
        "gradients": sum(local(p.grad).nbytes for p in parameters),
        "momentum": sum(local(optimiser.state[p]["momentum_buffer"]).nbytes for p in parameters),
        "buffers": sum(b.nbytes for b in network.buffers()),
        "saved": saved,
        "collectives": [*seen],
    }


CASES = [
    ("group", "gc2l", 4, 1, 2),
    ("group", "gc2l", 4, 1, 4),
    ("group", "gc2l", 4, 2, 2),
    ("group", MORE, 4, 1, 2),
    ("group", MORE, 4, 2, 2),
    ("group", "gc", 4, 1, 2),
]
CASES += [
    ("ddp", "sc", 1, 2, 1),
    ("channel", "sc", 1, 1, 2),
    ("channel", "sc", 1, 1, 4),
    ("fsdp", "sc", 1, 4, 1),
]


@pytest.mark.parametrize(("strategy", "conv", "groups", "data", "inner"), CASES)
def test_ranks_hold_and_send_what_the_model_says(pool, strategy, conv, groups, data, inner):
    batch = 4
    traced, setting = workload("wrn-10-2", **options_of(conv, groups)), Setting(SIMPLE, batch)
    cost = {
        "group": lambda: group_cost(traced, setting, conv, data=data, group=inner),
        "ddp": lambda: group_cost(traced, setting, conv, data=data, group=inner),
        "channel": lambda: channel_cost(traced, setting, data=data, ranks=inner),
        "fsdp": lambda: fsdp_cost(traced, setting, conv, ranks=data),
    }[strategy]()
    ranks = data * inner
    found = pool.run(ranks_hold, strategy, "wrn-10-2", conv, groups, data, inner, batch, ranks=ranks)
    expected = Counter((m.kind, m.bytes_in) for m in cost.messages)
    for rank, one in enumerate(found):
        if strategy == "fsdp" and rank:  # parts at the end are smaller, and the model is of the first
            continue
        assert one["parameters"] == cost.parameter_bytes
        assert one["gradients"] == cost.gradient_bytes
        assert one["momentum"] == cost.momentum_bytes
        assert one["buffers"] == buffers(traced, traced.layers, inner)
        assert one["saved"] in (cost.activation_bytes, None)
    seen = Counter(found[0]["collectives"])
    if strategy == "fsdp":
        # FSDP pads every parameter to a multiple of the ranks; here only the classifier's ten rows are not one.
        padding = 4 * 2 * (128 + 1)
        assert Counter(kind for kind, _ in seen.elements()) == cost.collectives
        given = {k: sum(size for kind, size in seen.elements() if kind == k) for k in cost.collectives}
        model = {k: sum(m.bytes_in for m in cost.messages if m.kind == k) for k in cost.collectives}
        assert 0 <= given["reduce-scatter"] - model["reduce-scatter"] <= padding
        assert 0 <= given["all-gather"] - model["all-gather"] <= padding
    elif data > 1:
        # DDP's last buckets hold what is left, so only their sum is asked for; everything else exactly.
        bucket_bytes = sum(size for kind, size in seen.elements() if kind == "all-reduce")
        assert bucket_bytes == sum(m.bytes_in for m in cost.messages if m.kind == "all-reduce")
        assert {k: v for k, v in seen.items() if k[0] != "all-reduce"} == {
            k: v for k, v in expected.items() if k[0] != "all-reduce"
        }
    else:
        assert seen == expected


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", ["wrn-10-2", "wrn-28-1"])
def test_stages_are_those_that_the_package_trains(name, stages):
    with torch.device("meta"):
        network = models.create(name)
    real = [
        sum(p.numel() for p in stage.network.parameters())
        for stage in cut_stages(network, stages, (3, 16, 16))
    ]
    assert [sum(layer.size for layer in layers) for layers in cut(workload(name), stages)] == real


def test_more_stages_than_places_are_refused():
    with pytest.raises(
        UserError, match=r"^stages=30: the network can be cut in \d+ places; use \d+ or fewer$"
    ):
        cut(workload("wrn-10-1"), 30)
