"""Fully sharded data parallelism (FSDP2): every rank computes on its images and keeps 1/P of every parameter.

A block's parameters are gathered just before they are used, forward and backward, and its gradients are
reduce-scattered to the ranks that keep them: `torch.distributed.fsdp.fully_shard`, block by block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from twolevel.distributed.layerwise import draw, synchronise_batch_norm
from twolevel.errors import UserError
from twolevel.nn import Layout, layout_of
from twolevel.nn.base import WholeConv2d


def shard_parameters(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    sync_batch_norm: bool = False,
) -> FSDPModule:
    """Shard every parameter of `model`, in place, over the mesh's `data` axis: they become DTensors `[Shard(0)]`.

    Buffers stay whole on every rank. With `device`, the network is one of the meta device and is drawn here from
    `seed`, block by block, with the values of the whole network and in `dtype`: no rank ever holds the whole.

    Raises UserError for a mesh that also has a `group` axis, and for convolutions whose parameters are read outside
    of their forward.
    """
    if mesh["group"].size() > 1:
        raise UserError(
            f"parallel=fsdp shards over the data axis alone, not over group={mesh['group'].size()} ranks as well"
        )
    for name, module in model.named_modules():
        if isinstance(module, WholeConv2d):
            raise UserError(
                f"{name} is a {type(module).__name__}, which parallel=fsdp cannot shard; use conv sc, gc or gc2l"
            )
    whole = layout_of(model)
    if sync_batch_norm:
        synchronise_batch_norm(model, mesh)
    for name, block in [*_blocks(model), ("", model)]:
        if device is not None:
            _draw_rest(block, name, whole, seed, device, dtype)
        fully_shard(block, mesh=mesh["data"])
    return model


def clip_sharded_gradients_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients by max_norm / norm where that is below 1; returns the norm before, a scalar."""
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def _blocks(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The members of Sequentials that hold a convolution or linear layer: what is gathered at a time."""
    for child, module in model.named_children():
        path = f"{name}.{child}" if name else child
        works = any(isinstance(m, nn.Conv2d | nn.Linear) for m in module.modules())
        if isinstance(model, nn.Sequential) and works and not isinstance(module, nn.Sequential):
            yield path, module
        elif isinstance(module, nn.Sequential):
            yield from _blocks(module, path)


def _draw_rest(
    block: nn.Module, name: str, whole: Layout, seed: int, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Draw what of `block` is still on the meta device: all of a block, and what of the model is in none."""
    for path, module in block.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if own and all(tensor.is_meta for tensor in own):
            draw(module, ".".join(filter(None, (name, path))), whole, seed, device)
            module.to(dtype)
