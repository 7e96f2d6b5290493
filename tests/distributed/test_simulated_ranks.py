"""One rank without the others: its collectives have the shapes of real ones, and nothing is waited for."""

import pytest
import torch
import torch.distributed as dist

from twolevel.distributed import MeshAxis
from twolevel.distributed.environment import simulate, start, stop
from twolevel.distributed.simulation import SimulatedAxis, simulated_ranks
from twolevel.errors import UserError


def results(axis: MeshAxis, dtype: torch.dtype) -> dict[str, tuple]:
    """Shape, strides and type of what every collective of an axis returns."""
    own = torch.arange(24.0).view(2, 3, 4).to(dtype)
    parts = own.repeat(axis.ranks, 1, 1)
    total = own.clone()
    axis.all_reduce_(total)
    found = {
        "gather": axis.gather(own).wait(),
        "scatter_sum": axis.scatter_sum(parts).wait(),
        "sum": axis.sum(own.clone()).wait(),
        "all_gather": axis.all_gather(own.flatten()),
        "all_reduce_": total,
        "sum_logits": axis.sum_logits(own[0].requires_grad_()),
        "share_input": axis.share_input(own),
    }
    return {name: (tuple(t.shape), t.stride(), str(t.dtype)) for name, t in found.items()}


def real_results(dtype: torch.dtype) -> dict[str, tuple]:
    return results(MeshAxis(dist.group.WORLD), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_simulated_axis_returns_what_has_the_form_of_a_real_one(pool, dtype):
    assert results(SimulatedAxis(2), dtype) == pool.run(real_results, dtype, ranks=2)[0]


def test_what_others_would_send_are_copies_of_its_own():
    axis, own = SimulatedAxis(3), torch.randn(2, 4)
    gathered = axis.gather(own).wait()
    assert torch.equal(gathered, torch.cat([own] * 3))
    scattered = axis.scatter_sum(gathered).wait()
    assert torch.equal(scattered, own) and scattered.data_ptr() != gathered.data_ptr()
    assert torch.equal(axis.all_gather(own.flatten()), own.flatten().expand(3, 8))
    assert torch.equal(axis.sum_logits(own), own)


def test_a_simulated_world_is_rank_0_of_so_many_and_leaves_no_process_group():
    world = simulate(1000, "cpu")
    try:
        assert (world.rank, world.size, dist.get_world_size()) == (0, 1000, 1000)
        assert (world.local_rank, world.local_size) == (0, 1)  # it is alone on its machine
        dist.barrier()  # nobody else comes
        with pytest.raises(UserError, match="simulate=4 makes a process group of its own, and one exists"):
            simulate(4)
    finally:
        stop(world)
    assert not dist.is_initialized()
    with simulated_ranks(7):
        assert dist.get_world_size() == 7
    assert not dist.is_initialized()


def test_a_device_that_is_not_there_is_refused_as_in_a_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    messages = []
    for begin in (lambda: start("cuda"), lambda: simulate(4, "cuda")):
        with pytest.raises(UserError) as info:
            begin()
        messages.append(str(info.value))
    assert messages[0] == messages[1] and "device=cuda but" in messages[0]
    assert not dist.is_initialized()
