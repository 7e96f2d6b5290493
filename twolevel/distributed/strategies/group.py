"""parallel=group: replicas along the `data` axis, each cut by channel group along the `group` axis."""

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from twolevel.distributed.parallelize import parallelize
from twolevel.distributed.replicas import replicate
from twolevel.distributed.strategies.base import Placed, Strategy


class GroupParallel(Strategy):
    """`exchange` and `timeout_s` are as in `twolevel.distributed.parallelize`."""

    parallel = "group"

    def __init__(
        self,
        mesh: DeviceMesh,
        device: torch.device | str,
        *,
        precision: str = "float32",
        exchange: str = "auto",
        timeout_s: float = 600.0,
    ):
        super().__init__(mesh, device, precision=precision)
        self.exchange, self.timeout_s = exchange, timeout_s

    def _place(
        self, network: nn.Module, seed: int, image_shape: tuple[int, int, int], sync_batch_norm: bool
    ) -> "PlacedReplica":
        parallelize(
            network,
            self.mesh,
            sync_batch_norm=sync_batch_norm,
            exchange=self.exchange,
            timeout_s=self.timeout_s,
        )
        return PlacedReplica(self, self._draw(network, seed))


class PlacedReplica(Placed):
    """A part of a network that is whole over the ranks of a `group` axis, and has replicas along `data`."""

    @cached_property
    def network(self) -> nn.Module:
        """What averages gradients over replicas. Made for the first step, since a test needs none of its memory."""
        return replicate(self.model, self.mesh)

    def _synchronised(self, *, last_part: bool) -> AbstractContextManager[None]:
        if isinstance(self.network, DistributedDataParallel) and not last_part:
            return self.network.no_sync()
        return nullcontext()
