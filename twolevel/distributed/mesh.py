"""The mesh of ranks: `data` (replicas) by `group` (parts of one network), group innermost."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from twolevel.distributed import nccl
from twolevel.distributed.environment import World, start
from twolevel.errors import UserError


def init_mesh(
    data: int = 1, group: int | None = None, *, device: str = "auto", timeout_s: float = 600
) -> DeviceMesh:
    """A mesh of data x group ranks over the whole world, which torchrun, MPI or Slurm has started.

    `group` defaults to all ranks that `data` leaves; without a launcher there is one rank. Ranks that
    follow each other share a `group` axis, so that it stays within a node where it fits. The ranks of an
    axis wait for each other for `timeout_s` in a collective; an axis of all ranks has the default process
    group, which keeps its own timeout if it exists already.

    Raises UserError where data x group is not the number of ranks.
    """
    return lay_out(start(device, timeout_s), data, group, timeout_s)


def lay_out(world: World, data: int, group: int | None, timeout_s: float) -> DeviceMesh:
    """As `init_mesh`, over the ranks of a world that `start` has given."""
    came = "simulated" if world.simulated else "started"
    check_mesh(data, group, world.size, came)
    ranks = torch.arange(world.size).view(data, -1)
    axes = {"data": ranks.T, "group": ranks}
    # Not by init_device_mesh, whose groups wait for torch's default of half an hour.
    groups = [_own_group(name, lines.tolist(), timeout_s) for name, lines in axes.items()]
    return DeviceMesh.from_group(groups, world.device.type, ranks, mesh_dim_names=tuple(axes))


def _own_group(axis: str, lines: list[list[int]], timeout_s: float) -> dist.ProcessGroup:
    """The group of this rank's line of ranks along an axis; every rank makes those of all lines."""
    if len(lines) == 1:
        own = dist.group.WORLD
    else:
        with nccl.own_timeout():
            own, _ = dist.new_subgroups_by_enumeration(
                lines,
                timeout=timedelta(seconds=timeout_s),
                pg_options=nccl.options(dist.get_backend_config()),
                group_desc=f"mesh_{axis}",
            )
    assert isinstance(own, dist.ProcessGroup)  # every rank is in one line
    return own


def check_mesh(data: int, group: int | None, world_size: int, came: str = "started") -> None:
    """Raise UserError unless a mesh of data x group takes all `world_size` ranks that `came`."""
    for name, size in (("data", data), ("group", group)):
        if size is not None and size < 1:
            raise UserError(f"mesh axis {name}={size} is not positive; use 1 or more")
    if group is None and world_size % data:
        raise UserError(f"mesh axis data={data} does not divide the {world_size} ranks that were {came}")
    if group is not None and data * group != world_size:
        raise UserError(
            f"mesh data={data} x group={group} takes {data * group} ranks, but {world_size} were {came}; "
            f"take {data * group} or choose axes whose product is {world_size}"
        )
