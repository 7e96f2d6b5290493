"""One rank of N without the others: this process holds and computes what rank 0 would, and nothing is sent.

The process group is torch's fake one, with N ranks of which this process is the first. The package's own code cuts
the network by it; what would come from other ranks is copied from this one, in the right shape. So times are those of
one rank's computation, and values mean nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch.distributed documents it, and its type hints leave it out.
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.parallel import DistributedDataParallel

from twolevel.distributed.collectives import MeshAxis
from twolevel.ops.exchange import Copies, Done, register

FAKE = "fake"
"""What torch calls the backend of such a group."""


def begin(ranks: int) -> None:
    """Make the default process group one of `ranks` ranks, of which there is this one alone, rank 0."""
    dist.init_process_group(FAKE, rank=0, world_size=ranks)


@contextmanager
def simulated_ranks(ranks: int) -> Iterator[None]:
    """In it this process is rank 0 of `ranks`, of which there are no others."""
    begin(ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_simulated(group: dist.ProcessGroup) -> bool:
    """Whether this group has no other ranks than this process, whatever its size."""
    return dist.get_backend(group) == FAKE


class SimulatedAxis(MeshAxis):
    """A MeshAxis of `ranks` ranks that are all this one: its collectives return copies at once. It needs no group."""

    def __init__(self, ranks: int):
        self.ranks, self.waited = ranks, 0.0
        self.key = register(self)
        self._copies = Copies(ranks)

    def gather(self, own: Tensor) -> Any:
        """`[G/P, ...] -> [G, ...]`: its own part for each."""
        return self._copies.gather(own)

    def scatter_sum(self, parts: Tensor) -> Any:
        """`[G, ...] -> [G/P, ...]`: its own part, in memory of its own as after a real one."""
        return Done(self._copies.scatter_sum(parts).wait().clone())

    def sum(self, own: Tensor) -> Any:
        """`own` as it is."""
        return self._copies.sum(own)

    def all_gather(self, own: Tensor) -> Tensor:
        return own.repeat(self.ranks, 1)

    def all_reduce_(self, tensor: Tensor) -> None:
        pass


def keep_own_gradients(network: DistributedDataParallel, group: dist.ProcessGroup) -> nn.Module:
    """Have replicas that are simulated take their own gradients for the mean; DDP alone stumbles over such a group.

    The work of the built-in sum that it waits for holds no tensor.
    """
    network.register_comm_hook(group, _keep_own)
    return network


def _keep_own(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    dist.all_reduce(bucket.buffer(), group=group)
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
