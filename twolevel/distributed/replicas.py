"""Replicas along the `data` axis: the average of their gradients, and the buffers of the first for all."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from twolevel.distributed.simulation import is_simulated, keep_own_gradients


def replicate(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Average gradients over the `data` axis with DistributedDataParallel; nothing where it has one rank.

    Batch norm is local to a rank, as by default in DDP, unless `parallelize` synchronised it.
    """
    if mesh["data"].size() == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_in_strides, parameter.stride()))
    group = mesh.get_group("data")
    replicas = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    return keep_own_gradients(replicas, group) if is_simulated(group) else replicas


def _in_strides(strides: tuple[int, ...], gradient: Tensor) -> Tensor:
    """The gradient in its parameter's strides where they differ in sizes of 1 alone, as a view.

    Autograd takes such gradients as they are (others it copies), and DDP, whose buckets have the strides of
    parameters, then warns. Most are of 1 x 1 kernels, which channels_last and contiguous memory stride differently.
    """
    sizes = zip(gradient.shape, gradient.stride(), strides, strict=True)
    if any(size != 1 and own != other for size, own, other in sizes):
        return gradient
    return gradient.as_strided(gradient.shape, strides)


@torch.no_grad()
def sync_buffers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every replica the buffers (running statistics) of the first, as DDP does before each forward."""
    if mesh["data"].size() == 1:
        return
    group = mesh.get_group("data")
    for buffer in model.buffers():
        dist.broadcast(buffer, group=group, group_src=0)
