"""Batch normalisation over the images of every data-parallel rank, on CPUs and GPUs alike."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.layers import become
from twolevel.nn.batch_norm import SyncedBatchNorm2d
from twolevel.ops.kernels.normalise import Moments, TorchNormaliser
from twolevel.ops.normalise import over_replicas


def synchronise_batch_norm(model: nn.Module, mesh: DeviceMesh) -> None:
    """Take batch statistics over the mesh's `data` axis."""
    if mesh["data"].size() == 1:
        return
    axis = MeshAxis(mesh.get_group("data"))
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            become(module, SyncedBatchNorm2d).axis = axis


def batch_statistics(x: Tensor, axis: MeshAxis) -> Moments:
    """Mean and variance `[C]` of x `[B, C, H, W]` over all ranks, images and pixels, and the number of those."""
    return over_replicas(TorchNormaliser().moments(x), axis if axis.ranks > 1 else None)
