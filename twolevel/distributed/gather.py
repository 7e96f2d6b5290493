"""The way back: one whole network from the parts that ranks hold."""

import copy
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from twolevel.distributed.collectives import MeshAxis
from twolevel.errors import UserError
from twolevel.nn import layout_of


def remember_whole(model: nn.Module) -> None:
    """Keep in `model`, which is about to be cut, what it is now, without values: `gather` begins from it."""
    try:
        whole = _copy_without_values(model)
    except Exception as error:  # only `gather` needs it
        whole = error
    object.__setattr__(model, "whole", whole)  # no submodule of it


def _copy_without_values(model: nn.Module) -> nn.Module:
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, {key: _on_meta(tensor) for key, tensor in tensors.items()})


def _on_meta(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor.detach(), device="meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


@torch.no_grad()
def gather(
    model: nn.Module, mesh: DeviceMesh, *, device: torch.device | str = "cpu", rank: int | None = None
) -> nn.Module | None:
    """The single-process network of the parts that `parallelize` has left on the ranks, with their values.

    It has the classes and names that it had before, and computes what the ranks compute together; `models.load`,
    `convert`, torch.save or another `parallelize` take it as any other. Parts are gathered tensor by tensor over the
    `group` axis, from each rank's own replica. The network itself is unchanged. Every rank must call this.

    Args:
        model: what `parallelize` returned, `replicate`'s wrapper of it, or a moving average of it.
        device: where the whole network is to be.
        rank: the only rank of the world that keeps it, so that a machine holds it once; the others return None.
            By default every rank keeps one.

    Raises:
        UserError: it is a part in another way than by `parallelize`, or could not be copied.
    """
    while isinstance(model, DistributedDataParallel | AveragedModel):
        model = model.module
    layout = layout_of(model)
    whole = getattr(model, "whole", model if layout.parts == 1 else None)
    if whole is None:
        raise UserError(
            f"this {type(model).__name__} is a part that parallelize has not made; gather takes one"
        )
    if isinstance(whole, Exception):
        raise UserError(
            f"{type(model).__name__} cannot be copied, so it cannot be gathered ({whole}); use a checkpoint"
        )
    keep = rank is None or dist.get_rank() == rank
    found = _copy_without_values(whole).to_empty(device=device) if keep else None
    axis = MeshAxis(mesh.get_group("group"))
    places = {} if found is None else {**dict(found.named_parameters()), **dict(found.named_buffers())}
    for name, part in chain(model.named_parameters(), model.named_buffers()):
        tensor = part.detach()
        dim = layout.dims[name]
        if layout.is_split(name) and dim is not None:
            tensor = axis.all_gather(tensor.transpose(0, dim).flatten())
            tensor = torch.cat([own.view(part.transpose(0, dim).shape) for own in tensor]).transpose(0, dim)
        if found is not None:
            places[name].copy_(tensor)
    return None if found is None else _in_the_mode_of(model, found)


def _in_the_mode_of(model: nn.Module, whole: nn.Module) -> nn.Module:
    """Training mode and what is frozen, which may have changed since the cut."""
    for name, module in model.named_modules():
        whole.get_submodule(name).training = module.training
    for name, parameter in model.named_parameters():
        whole.get_parameter(name).requires_grad_(parameter.requires_grad)
    return whole
