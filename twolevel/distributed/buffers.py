"""Buffers of replicas."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import DeviceMesh


@torch.no_grad()
def sync_buffers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every replica the buffers (running statistics) of the first, as DDP does before each forward."""
    if mesh["data"].size() == 1:
        return
    group = mesh.get_group("data")
    for buffer in model.buffers():
        dist.broadcast(buffer, group=group, group_src=0)
