"""On ranks blocks are computed again bit for bit, and what was sent is not sent again."""

import pytest
import torch
from test_exchange import Collectives
from torch.nn import functional as F

from twolevel.distributed import init_mesh, parallelize, replicate
from twolevel.models import create
from twolevel.nn import recompute_blocks


def train(conv, data, recompute, schedule):
    """Losses, gradients, state and collectives of three steps."""
    mesh = init_mesh(data, device="cpu")
    options = {"schedule": schedule, "kernels": "grouped"} if conv == "gc2l" else {}
    model = create("wrn-10-1", conv=conv, groups=4, num_classes=10, **options).train()
    parallelize(model, mesh, sync_batch_norm=True)
    if recompute:
        assert recompute_blocks(model) == 3
    network = replicate(model, mesh)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8)
    images, labels = (t.chunk(data)[mesh.get_local_rank("data")] for t in (images, labels))
    losses = []
    with Collectives() as collectives:
        for _ in range(3):
            loss = F.cross_entropy(network(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return (losses, gradients, model.state_dict()), sorted(collectives.seen)


@pytest.mark.parametrize(
    ("conv", "schedule"), [("gc2l", "overlapped"), ("gc2l", "fused"), ("bgc", None), ("gc", None)]
)
@pytest.mark.parametrize(("data", "ranks"), [(1, 2), (1, 4), (2, 4)])
def test_the_same_bits_and_the_same_collectives(pool, data, ranks, conv, schedule):
    plain = pool.run(train, conv, data, False, schedule, ranks=ranks)
    again = pool.run(train, conv, data, True, schedule, ranks=ranks)
    for (found, sent), (wanted, sent_before) in zip(again, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert sent == sent_before and len(sent) >= 3
