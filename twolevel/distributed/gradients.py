"""The norm of all gradients of a network, and clipping by it, however ranks share the network."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from twolevel.nn import layout_of


@torch.no_grad()
def gradient_norm(model: nn.Module, mesh: DeviceMesh, *, stages: bool = False) -> Tensor:
    """The Euclidean norm of every gradient of the whole network, each counted once: a scalar, no host wait.

    | parameters                                              | counted                                |
    |---------------------------------------------------------|----------------------------------------|
    | split by channel over `group`                           | summed over its ranks                  |
    | whole on every rank of `group` (the classifier's bias)  | as they are                            |
    | of one stage of a pipeline, with `stages`               | summed over the ranks of `group`       |
    | DTensors (parallel=fsdp)                                | by DTensor's own norm, over their mesh |

    One all-reduce of a scalar; none with one rank, for DTensors theirs.
    """
    layout = layout_of(model)
    split, whole = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            (split if stages or layout.is_split(name) else whole).append(parameter.grad)
    if whole and isinstance(whole[0], DTensor):
        norm = get_total_norm(whole)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()
    square = get_total_norm(split) ** 2
    if mesh["group"].size() > 1:
        square = square.to(mesh.device_type)
        dist.all_reduce(square, dist.ReduceOp.SUM, mesh.get_group("group"))
    return (square + get_total_norm(whole) ** 2).sqrt()


def clip_gradients_(model: nn.Module, mesh: DeviceMesh, max_norm: float, *, stages: bool = False) -> Tensor:
    """Scale all gradients by max_norm / norm where that is below 1; returns the norm before, as `gradient_norm`."""
    norm = gradient_norm(model, mesh, stages=stages)
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
