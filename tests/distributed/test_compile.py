"""A network split over ranks compiles into one graph, forward and backward, and computes what it did before."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from twolevel.distributed import parallelize
from twolevel.models import create


def eager_and_compiled(schedule):
    """Gradients and logits of one step; `fullgraph` refuses a graph that breaks anywhere, exchange included."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "group"))
    torch.manual_seed(0)
    model = create("wrn-10-1", conv="gc2l", groups=4).double().to(memory_format=torch.channels_last)
    for module in model.modules():
        if hasattr(module, "schedule"):
            module.schedule = schedule
    parallelize(model, mesh)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    found = []
    for network in (copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)):
        logits = network(x)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad for p in network.parameters())])
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("schedule", ["auto", "fused"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_network_compiles_into_one_graph(pool, ranks, schedule):
    for eager, compiled in pool.run(eager_and_compiled, schedule, ranks=ranks):
        assert len(eager) > 10
        # float64; the compiler may add up in another order.
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-9)
