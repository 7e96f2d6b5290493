"""A network in the form in which it is exported."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.export import Dim, ExportedProgram

from twolevel.errors import UserError
from twolevel.models.exporting.quiet import quiet
from twolevel.nn import for_inference
from twolevel.nn.base import ShardedConv2d
from twolevel.nn.inference.exportable import exportable

TRACED_BATCH = 2  # torch.export takes 1 for a constant
BATCH = "batch"


class Source(NamedTuple):
    """The network that is exported, in evaluation mode, float32 and contiguous memory on the CPU."""

    model: nn.Module
    image_shape: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, image_shape: tuple[int, ...]) -> "Source":
        """A copy of a network. Raises UserError for a part of one, and for one that has no values."""
        tensors = [*model.parameters(), *model.buffers()]
        sharded = any(isinstance(m, ShardedConv2d) and m.exchange.ranks > 1 for m in model.modules())
        if sharded or any(isinstance(tensor, DTensor) for tensor in tensors):
            raise UserError(
                "this rank holds a part of the network; export a checkpoint of all ranks by twolevel export"
            )
        if any(tensor.is_meta for tensor in tensors):
            raise UserError(
                "the network is on the meta device and has no values; load or initialize it first"
            )
        own = copy.deepcopy(model).to("cpu").eval().requires_grad_(False)
        for tensor in (*own.parameters(), *own.buffers()):
            if (
                tensor.is_floating_point() and tensor.dim()
            ):  # a single number, such as progress, loses nothing
                tensor.data = tensor.to(torch.float32, memory_format=torch.contiguous_format)
        return cls(own, tuple(image_shape))

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """What the network computes. Raises UserError where it cannot, or that is not one tensor."""
        try:
            y = self.model(images)
        except (RuntimeError, ValueError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the network cannot compute images of {[*self.image_shape]}: {why}; give the shape that it takes"
            ) from error
        if not isinstance(y, Tensor):
            raise UserError(
                f"the network returns a {type(y).__name__}; export takes one that returns a tensor"
            )
        return y

    def program(self) -> ExportedProgram:
        """The network in inference form, traced by torch.export for batches of any size. Raises UserError."""
        images = torch.zeros(TRACED_BATCH, *self.image_shape)
        self.outputs(images)  # which says better than a tracer what is wrong
        form = exportable(for_inference(self.model))
        try:
            with quiet(), torch.no_grad():
                return torch.export.export(form, (images,), dynamic_shapes=({0: Dim(BATCH)},), strict=False)
        except (
            Exception
        ) as error:  # whatever the network's own code raises on torch.export's stand-ins for tensors
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{type(self.model).__name__} cannot be exported for batches of any size: {why}"
            ) from error
