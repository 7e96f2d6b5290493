"""A network split over ranks compiles into one graph, forward and backward, and computes what it did before."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from inductor import fresh_inductor, needs_compiler
from torch.distributed.device_mesh import init_device_mesh

from twolevel.distributed import parallelize
from twolevel.models import create


def step(network, x):
    """Logits and gradients."""
    network.zero_grad()
    logits = network(x)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in network.parameters())]


def eager_and_compiled(schedule, backend, conv="gc2l"):
    """A step in each, with its collectives; `fullgraph` refuses a graph that breaks anywhere, exchange included."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "group"))
    torch.manual_seed(0)
    model = create("wrn-10-1", conv=conv, groups=4).double().to(memory_format=torch.channels_last)
    for module in model.modules():
        if hasattr(module, "schedule"):
            module.schedule = schedule
    parallelize(model, mesh)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    found = []
    for network in (copy.deepcopy(model), torch.compile(model, backend=backend, fullgraph=True)):
        step(network, x)  # compiles
        # Not a dispatch mode, which would not see inside the operators of a compiled graph.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            computed = step(network, x)
        collectives = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
        found.append((computed, collectives))
    torch._dynamo.reset()
    return found


def generated(schedule, cache, conv):
    with fresh_inductor(cache) as kernels:
        found = eager_and_compiled(schedule, "inductor", conv)
        return found, kernels()


def assert_same_step(eager, compiled, ranks):
    (wanted, wanted_collectives), (computed, collectives) = eager, compiled
    assert len(wanted) > 10
    # float64; the compiler may add up in another order.
    torch.testing.assert_close(computed, wanted, rtol=1e-9, atol=1e-9)
    assert collectives == wanted_collectives
    assert bool(collectives) == (ranks > 1)


@pytest.mark.parametrize("schedule", ["auto", "fused"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_network_compiles_into_one_graph(pool, ranks, schedule):
    for eager, compiled in pool.run(eager_and_compiled, schedule, "aot_eager", ranks=ranks):
        assert_same_step(eager, compiled, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_network_of_balanced_convolutions_compiles_into_one_graph(pool, ranks):
    for eager, compiled in pool.run(eager_and_compiled, None, "aot_eager", "bgc", ranks=ranks):
        assert_same_step(eager, compiled, ranks)


@needs_compiler
@pytest.mark.parametrize(
    ("ranks", "schedule", "conv"), [(1, "dense", "gc2l"), (2, "auto", "gc2l"), (2, None, "bgc")]
)
def test_code_generated_for_a_split_network_computes_the_same(pool, tmp_path, ranks, schedule, conv):
    """Two ranks compile at the same time, into one folder."""
    # The compiler starts some twenty times; a busy machine takes a second or two for each.
    for found, kernels in pool.run(generated, schedule, str(tmp_path), conv, ranks=ranks, timeout=300):
        assert_same_step(*found, ranks)
        assert kernels > 10
