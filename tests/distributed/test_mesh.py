"""The mesh of ranks: its axes, and how long the ranks of each wait for each other."""

from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from twolevel.distributed import init_mesh
from twolevel.training.config import MeshConfig
from twolevel.training.context import join

AXES = ("data", "group")


def described(mesh) -> dict[str, tuple]:
    """The ranks and the timeout of each axis's group."""
    groups = {axis: mesh.get_group(axis) for axis in AXES}
    return {
        axis: (dist.get_process_group_ranks(group), group._get_backend(torch.device("cpu")).options._timeout)
        for axis, group in groups.items()
    }


def axes_of_a_mesh(data: int, timeout_s: float) -> dict[str, tuple]:
    return described(init_mesh(data, device="cpu", timeout_s=timeout_s))


def axes_of_training(config: MeshConfig) -> dict[str, tuple]:
    ranks = join(config, {})
    try:
        return described(ranks.mesh)
    finally:
        ranks.close()


@pytest.mark.parametrize("data", [1, 2, 4])
def test_every_axis_waits_as_long_as_was_asked(pool, data):
    for rank, axes in enumerate(pool.run(axes_of_a_mesh, data, 5, ranks=4, init=False)):
        group = 4 // data
        first = rank // group * group
        assert axes["group"] == ([*range(first, first + group)], timedelta(seconds=5))
        assert axes["data"] == ([*range(rank % group, 4, group)], timedelta(seconds=5))


def test_so_it_does_in_a_world_that_exists_with_a_longer_timeout(pool):
    for axes in pool.run(axes_of_a_mesh, 2, 5, ranks=4):
        assert {timeout for _, timeout in axes.values()} == {timedelta(seconds=5)}


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data_parallel=2, timeout=5, device="cpu"),
        MeshConfig(parallel="fsdp", timeout=5, device="cpu"),
        MeshConfig(parallel="gpipe", timeout=5, device="cpu"),
    ],
    ids=lambda config: config.parallel,
)
def test_the_timeout_of_a_command_is_that_of_every_axis(pool, config):
    for axes in pool.run(axes_of_training, config, ranks=4, init=False):
        assert {timeout for _, timeout in axes.values()} == {timedelta(seconds=5)}


def wait_for_a_partner_that_stays_away() -> list[str]:
    """What rank 0 of a 2 x 2 mesh reads along each axis where nobody else calls the collective."""
    mesh, said = init_mesh(2, 2, device="cpu", timeout_s=0.5), []
    for axis in AXES:
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError) as caught:
                dist.all_reduce(torch.ones(1), group=mesh.get_group(axis))
            said.append(str(caught.value))
    return said


def test_a_rank_whose_partner_stays_away_stops_waiting_on_either_axis(pool):
    first, *others = pool.run(wait_for_a_partner_that_stays_away, ranks=4, init=False)
    assert len(first) == 2 and all("imed out" in said for said in first)
    assert others == [[], [], []]


def options_of_axes() -> list[tuple[int, bool]]:
    """How often options were given for the lines of an axis, and whether they ask for streams that run first."""
    made = []

    def make(lines, *, timeout, pg_options, group_desc):
        made.append((len(lines), pg_options.is_high_priority_stream))
        return dist.group.WORLD, []

    with (
        mock.patch.object(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl"),
        mock.patch.object(dist, "new_subgroups_by_enumeration", make),
        mock.patch("twolevel.distributed.mesh.DeviceMesh"),
    ):
        init_mesh(2, device="cpu")
    return made


def test_over_nccl_the_groups_of_all_axes_have_streams_that_run_first(pool):
    assert pool.run(options_of_axes, ranks=4) == [[(2, True), (2, True)]] * 4
