"""Ways to share a network over ranks, one file each: a `Strategy` by name, which places a network that can train.

strategy = create("group", mesh, device)
placed = strategy.place(network_on_meta, seed, (3, 32, 32))
placed.forward_backward(images, labels, loss)
placed.clip_(1.0)
"""

import torch
from torch.distributed.device_mesh import DeviceMesh

from twolevel.distributed.strategies.base import Placed, Strategy
from twolevel.distributed.strategies.channel import ChannelParallel
from twolevel.distributed.strategies.fsdp import FullyShardedParallel
from twolevel.distributed.strategies.group import GroupParallel
from twolevel.distributed.strategies.pipeline import PipelineParallel
from twolevel.errors import unknown
from twolevel.settings import PARALLELS, PIPELINES

__all__ = ["Placed", "Strategy", "create"]


def create(
    parallel: str,
    mesh: DeviceMesh,
    device: torch.device | str,
    *,
    precision: str = "float32",
    exchange: str = "auto",
    timeout_s: float = 600.0,
    microbatches: int | None = None,
) -> Strategy:
    """The strategy called `parallel` in `twolevel.settings.PARALLELS`, for the ranks of a mesh from `init_mesh`.

    `precision` is float32, bf16 (autocast) or float64. `exchange` and `timeout_s`, of group and channel, are as in
    `twolevel.distributed.parallelize`; `microbatches`, of gpipe and 1f1b, are as many as there are ranks unless given.

    Raises UserError for another name, or microbatches that the pipeline cannot schedule.
    """
    if parallel in PIPELINES:
        return PipelineParallel(
            mesh, device, parallel=parallel, precision=precision, microbatches=microbatches
        )
    if parallel == "fsdp":
        return FullyShardedParallel(mesh, device, precision=precision)
    exchanging = {"group": GroupParallel, "channel": ChannelParallel}
    if parallel not in exchanging:
        raise unknown("parallel", parallel, PARALLELS)
    return exchanging[parallel](mesh, device, precision=precision, exchange=exchange, timeout_s=timeout_s)
