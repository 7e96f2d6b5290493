"""Batch normalisation over the images of every data-parallel rank, on CPUs and GPUs alike."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from twolevel.distributed.collectives import MeshAxis, all_gather_single, refuse_second_derivative
from twolevel.distributed.layers import become


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all ranks' images: x `[B, C, H, W]`.

    (torch.nn.SyncBatchNorm does the same on GPUs and refuses CPUs.) One all-gather forward and one
    all-reduce backward, of 2 C + 1 and 2 C numbers; neither with one rank. Second derivatives across ranks are refused.
    """

    axis: MeshAxis

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.axis.ranks == 1:
            return super().forward(x)
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.axis.group)
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None and self.running_var is not None
            self.num_batches_tracked += 1
            rate = self.momentum
            if rate is None:  # the mean over all batches so far, without waiting for the device
                rate = 1 / self.num_batches_tracked.to(self.running_mean)
            unbiased = var * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_(unbiased.to(self.running_var), rate)
        return y


def synchronise_batch_norm(model: nn.Module, mesh: DeviceMesh) -> None:
    """Take batch statistics over the mesh's `data` axis."""
    if mesh["data"].size() == 1:
        return
    axis = MeshAxis(mesh.get_group("data"))
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            become(module, SyncedBatchNorm2d).axis = axis


def batch_statistics(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance `[C]` of x `[B, C, H, W]` over all ranks, images and pixels, and the number of those."""
    # In float32 at least, combined from each rank's own mean and variance: sums of squares would lose
    # digits (Chan, Golub, LeVeque, 1979).
    wide = x if x.dtype == torch.float64 else x.float()
    own_var, own_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    # Filled on the device: a copy from the host would be waited for, and no CUDA graph can hold it.
    own_count = own_mean.new_full((1,), x.numel() / x.shape[1])
    if group.size() == 1:
        return own_mean, own_var, own_count[0]
    own = torch.cat([own_mean, own_var, own_count])
    every = own.new_empty(group.size() * len(own))
    all_gather_single(every, own, group)
    means, variances, counts = every.view(group.size(), -1).split([x.shape[1], x.shape[1], 1], 1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / count
    return mean, var, count


class _Normalise(torch.autograd.Function):
    """y = w (x - mean) / sqrt(var + eps) + b with mean and var over all ranks, images and pixels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> Any:
        mean, var, count = batch_statistics(x, group)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, gy: Tensor, *_: Any) -> Any:
        x, weight, mean, inv_std, count = ctx.saved_tensors
        across = (None, slice(None), None, None)
        centred = (x - mean[across]) * inv_std[across]
        wide = gy if gy.dtype == torch.float64 else gy.float()
        g_bias = wide.sum((0, 2, 3))
        g_weight = (wide * centred).sum((0, 2, 3))
        sums = torch.stack([g_bias, g_weight]) / count
        refuse_second_derivative(sums)
        dist.all_reduce(sums, dist.ReduceOp.SUM, ctx.group)
        mean_g, mean_gx = sums
        gx = (wide - mean_g[across] - centred * mean_gx[across]) * inv_std[across]
        if weight is None:
            return gx.to(x.dtype), None, None, None, None
        gx = gx * weight[across]
        return gx.to(x.dtype), g_weight.to(weight.dtype), g_bias.to(weight.dtype), None, None
