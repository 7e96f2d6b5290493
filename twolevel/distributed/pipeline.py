"""Model parallelism by layers: each rank of the mesh's inner axis holds one stage, and microbatches pass through all.

    naive    one microbatch, so one rank works at a time; what the paper compares GC-2L with
    gpipe    all microbatches forward, then all backward (Huang et al., arXiv 1811.06965)
    1f1b     a stage computes one backward after each forward, as soon as it can: fewer activations are kept

Run by torch.distributed.pipelining. Batch norm sees one microbatch at a time, as with accumulated parts of a batch.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from twolevel.distributed.stages import Stage
from twolevel.errors import UserError

SCHEDULES = {"naive": ScheduleGPipe, "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Pipeline:
    """Runs this rank's `stage`, as all other ranks of the mesh's `group` axis run theirs.

    `loss` is a function of (logits, labels), called on the last rank for each microbatch, whose gradients are summed:
    it divides by their number. `schedule` is one of naive, gpipe and 1f1b. Every rank must make the same calls.

    Raises UserError where 1f1b has fewer microbatches than stages.
    """

    def __init__(
        self,
        stage: Stage,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        schedule: str,
        microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
    ):
        self.stage, self.device = stage, device
        self.group = mesh.get_group("group")
        self.rank, self.ranks = self.group.rank(), self.group.size()
        if schedule == "1f1b" and microbatches < self.ranks:
            raise UserError(
                f"microbatches={microbatches} is fewer than the {self.ranks} stages, which parallel=1f1b cannot "
                f"schedule; use {self.ranks} or more, or gpipe"
            )
        self.microbatches, self.loss = microbatches, loss
        self.make = SCHEDULES[schedule]
        self.dtype = dtype  # of images and logits
        self.crossing = autocast or dtype
        self.autocast = autocast
        self.schedules: dict[int, ScheduleGPipe | Schedule1F1B] = {}

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.ranks - 1

    def forward_backward(self, images: Tensor, labels: Tensor) -> None:
        """Add the gradients of a batch to those of this rank's parameters; `loss` is called for every microbatch.

        Only the first rank reads the images and only the last the labels; all need their number.
        """
        given = (_channels_inmost(images),) if self.is_first else ()
        self._schedule(len(images) // self.microbatches).step(
            *given, target=labels if self.is_last else None, return_outputs=False
        )

    @torch.no_grad()
    def logits(self, network: nn.Module, images: Tensor) -> Tensor | None:
        """The logits of any number of images on the last rank, None on the others; `network` is this rank's stage."""
        if self.is_first:
            x = _channels_inmost(images)
        else:
            x = torch.empty_like(self._received(len(images)), device=self.device)
            dist.recv(x, group=self.group, group_src=self.rank - 1)
        y = _Ends(network, self)(x)
        if self.is_last:
            return y
        dist.send(y, group=self.group, group_dst=self.rank + 1)
        return None

    def _schedule(self, size: int) -> ScheduleGPipe | Schedule1F1B:
        """The schedule of microbatches of `size` images: shapes are agreed on beforehand, and nothing is probed."""
        if size not in self.schedules:
            ends = _Ends(self.stage.network, self)
            given = {"input_args": self._received(size), "output_args": self._sent(size)}
            stage = PipelineStage(ends, self.rank, self.ranks, self.device, group=self.group, **given)
            self.schedules[size] = self.make(stage, self.microbatches, self.loss, scale_grads=False)
        return self.schedules[size]

    def _received(self, size: int) -> Tensor:
        """A meta tensor like what this stage's network is given for `size` images."""
        received = torch.empty(size, *self.stage.received, device="meta")
        if self.is_first:
            return _channels_inmost(received.to(self.dtype))
        return _channels_inmost(received.to(self.crossing)).requires_grad_()

    def _sent(self, size: int) -> Tensor:
        """A meta tensor like what this stage gives for `size` images."""
        sent = torch.empty(size, *self.stage.sent, device="meta")
        if self.is_last:
            return sent.to(self.dtype)
        return _channels_inmost(sent.to(self.crossing)).requires_grad_()


class _Ends(nn.Module):
    """A stage's network between what it receives and what it sends: contiguous, channels inmost, of a fixed type."""

    def __init__(self, network: nn.Module, pipeline: Pipeline):
        super().__init__()
        self.network = network
        self.last, self.autocast = pipeline.is_last, pipeline.autocast
        self.dtype = pipeline.dtype if self.last else pipeline.crossing

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.permute(0, 3, 1, 2)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            y = self.network(x)
        # Logits too: autocast has their loss computed in float32 anyway.
        return _contiguous(y.to(self.dtype)) if self.last else _channels_inmost(y.to(self.dtype))


def _channels_inmost(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as `[B, H, W, C]`, so that channels_last maps need no copy; contiguous whatever the shape."""
    return _contiguous(x.permute(0, 2, 3, 1) if x.dim() == 4 else x)


def _contiguous(x: Tensor) -> Tensor:
    """x in the strides of a new tensor: those of sizes 1 too, which is_contiguous() and contiguous() leave open."""
    return x.reshape(-1).view(x.shape)


@torch.no_grad()
def clip_staged_gradients_(model: nn.Module, mesh: DeviceMesh, max_norm: float) -> Tensor:
    """Scale the gradients of all stages by max_norm / norm where that is below 1; returns the norm before."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    square = nn.utils.get_total_norm(grads).to(mesh.device_type) ** 2
    dist.all_reduce(square, dist.ReduceOp.SUM, mesh.get_group("group"))
    norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
