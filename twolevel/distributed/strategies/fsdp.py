"""parallel=fsdp, fully sharded data parallelism (FSDP2): a rank computes on its images and keeps 1/P of each parameter.

A block's parameters are gathered just before they are used, forward and backward, and its gradients are
reduce-scattered to the ranks that keep them: `torch.distributed.fsdp.fully_shard`, block by block.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from twolevel.data.split import EvalSplit
from twolevel.distributed.batch_norm import synchronise_batch_norm
from twolevel.distributed.strategies.base import EVAL_BATCH, Placed, Strategy
from twolevel.errors import UserError
from twolevel.nn import Layout, initialize, layout_of
from twolevel.nn.base import ReplicatedConv2d
from twolevel.nn.structure import blocks, own_tensors


class FullyShardedParallel(Strategy):
    """Replicas along the `data` axis whose parameters are kept in parts."""

    parallel = "fsdp"

    def _place(
        self, network: nn.Module, seed: int, image_shape: tuple[int, int, int], sync_batch_norm: bool
    ) -> "PlacedShards":
        # fully_shard takes contiguous parameters: channels_last comes from the images alone.
        model = shard_parameters(
            network,
            self.mesh,
            seed=seed,
            device=self.device,
            dtype=self.dtype,
            sync_batch_norm=sync_batch_norm,
        )
        return PlacedShards(self, model)

    def __str__(self) -> str:
        return f"{self.mesh['data'].size()} fsdp ranks"


class PlacedShards(Placed):
    """A replica of which this rank keeps a part of every parameter, and gathers the rest block by block."""

    def compile_(self) -> None:
        # Gathering ends a graph at each block. All blocks are one class, so that torch would take their sizes for
        # variable, and then fails to generate code (2.15, CPU).
        self.model.compile(dynamic=False)

    def _synchronised(self, *, last_part: bool) -> AbstractContextManager[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last_part)
        return super()._synchronised(last_part=last_part)

    def eval_batches(self, model: nn.Module, test: EvalSplit) -> Generator[tuple[Tensor, Tensor], None, None]:
        """As many batches on every rank, since each takes part in every gathering; those to fill up have no labels."""
        ranks = self.mesh["data"].size()
        if len(test) < ranks:
            raise UserError(
                f"{len(test)} test images are too few for {ranks} ranks with parallel=fsdp; use fewer ranks"
            )
        most = -(-len(test) // ranks)
        number = 0
        try:
            for images, labels in test.eval_batches(EVAL_BATCH):
                yield images, labels
                number += 1
            for _ in range(number, -(-most // EVAL_BATCH)):
                yield images[:1], labels[:0]
        finally:
            self.end_forwards(model)

    def end_forwards(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the outermost keeps its parameters whole for a backward that does not come

    def num_parameters(self) -> int:
        return sum(p.to_local().numel() for p in self.model.parameters() if isinstance(p, DTensor))


def shard_parameters(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    sync_batch_norm: bool = False,
) -> nn.Module:
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
        if isinstance(module, ReplicatedConv2d):
            raise UserError(
                f"{name} is a {type(module).__name__}, which parallel=fsdp cannot shard; use conv sc, gc, gc2l or bgc"
            )
    whole = layout_of(model)
    if sync_batch_norm:
        synchronise_batch_norm(model, mesh)
    for name, block in [*blocks(model), ("", model)]:
        if device is not None:
            _draw_rest(block, name, whole, seed, device, dtype)
        fully_shard(block, mesh=mesh["data"])
    return model


def _draw_rest(
    block: nn.Module, name: str, whole: Layout, seed: int, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Draw what of `block` is still on the meta device: all of a block, and what of the model is in none."""
    for path, module in block.named_modules():
        tensors = own_tensors(module).values()
        if tensors and all(tensor.is_meta for tensor in tensors):
            key = ".".join(filter(None, (name, path)))
            initialize(module, seed, device, prefix=key, layout=whole.within(key))
            module.to(dtype)
