"""The mesh of ranks: `data` (replicas) by `group` (parts of one network), group innermost."""

from torch.distributed import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh

from twolevel.distributed.environment import start
from twolevel.errors import UserError


def init_mesh(data: int = 1, group: int | None = None, *, device: str = "auto") -> DeviceMesh:
    """A mesh of data x group ranks over the whole world, which torchrun, MPI or Slurm has started.

    `group` defaults to all ranks that `data` leaves; without a launcher there is one rank. Ranks that
    follow each other share a `group` axis, so that it stays within a node where it fits.

    Raises UserError where data x group is not the number of ranks.
    """
    world = start(device)
    check_mesh(data, group, world.size)
    shape = (data, group or world.size // data)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("data", "group"))


def check_mesh(data: int, group: int | None, world_size: int) -> None:
    """Raise UserError unless a mesh of data x group takes all `world_size` ranks."""
    for name, size in (("data", data), ("group", group)):
        if size is not None and size < 1:
            raise UserError(f"mesh axis {name}={size} is not positive; use 1 or more")
    if group is None and world_size % data:
        raise UserError(f"mesh axis data={data} does not divide the {world_size} ranks that were started")
    if group is not None and data * group != world_size:
        raise UserError(
            f"mesh data={data} x group={group} takes {data * group} ranks, but {world_size} were started; "
            f"start {data * group} or choose axes whose product is {world_size}"
        )
