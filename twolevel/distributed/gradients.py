"""The norm of all gradients of a network that is spread over ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from twolevel.nn import layout_of


@torch.no_grad()
def gradient_norm(model: nn.Module, mesh: DeviceMesh) -> Tensor:
    """The Euclidean norm of every gradient of the whole network, each counted once: a scalar, no host wait.

    Parameters that are split over the `group` axis are summed over its ranks; those that every rank holds
    whole (the classifier's bias) are counted as they are. One all-reduce of a scalar; none with one rank.
    """
    layout = layout_of(model)
    split, whole = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            (split if layout.is_split(name) else whole).append(parameter.grad)
    square = get_total_norm(split) ** 2
    if mesh["group"].size() > 1:
        square = square.to(mesh.device_type)
        dist.all_reduce(square, dist.ReduceOp.SUM, mesh.get_group("group"))
    return (square + get_total_norm(whole) ** 2).sqrt()


def clip_gradients_(model: nn.Module, mesh: DeviceMesh, max_norm: float) -> Tensor:
    """Scale all gradients by max_norm / norm where that is below 1; returns the norm before."""
    norm = gradient_norm(model, mesh)
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
