"""parallel=naive, gpipe, 1f1b: each rank of the mesh's inner axis holds one stage, and microbatches pass through all.

    naive    one microbatch, so one rank works at a time; what the paper compares GC-2L with
    gpipe    all microbatches forward, then all backward (Huang et al., arXiv 1811.06965)
    1f1b     a stage computes one backward after each forward, as soon as it can: fewer activations are kept

Run by torch.distributed.pipelining. Batch norm sees one microbatch at a time, as with accumulated parts of a batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from twolevel.distributed.gradients import clip_gradients_
from twolevel.distributed.strategies.base import Loss, Placed, Strategy, autocast
from twolevel.distributed.strategies.stages import Stage, cut_stages
from twolevel.errors import UserError

SCHEDULES = {"naive": ScheduleGPipe, "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class PipelineParallel(Strategy):
    """The layers over the ranks of the `group` axis; `parallel` is naive, gpipe or 1f1b.

    `microbatches` are as many as there are ranks unless given, of naive one. Raises UserError where 1f1b has fewer
    microbatches than stages.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        device: torch.device | str,
        *,
        parallel: str,
        precision: str = "float32",
        microbatches: int | None = None,
    ):
        super().__init__(mesh, device, precision=precision)
        self.parallel, ranks = parallel, mesh["group"].size()
        self.microbatches = 1 if parallel == "naive" else microbatches or ranks
        if parallel == "1f1b" and self.microbatches < ranks:
            raise UserError(
                f"microbatches={microbatches} is fewer than the {ranks} stages, which parallel=1f1b cannot "
                f"schedule; use {ranks} or more, or gpipe"
            )

    def _place(
        self, network: nn.Module, seed: int, image_shape: tuple[int, int, int], sync_batch_norm: bool
    ) -> "PlacedStage":
        stages = cut_stages(network, self.mesh["group"].size(), image_shape)
        stage = stages[self.mesh.get_local_rank("group")]
        return PlacedStage(self, stage, self._draw(stage.network, seed))

    def memory_format(self, network: nn.Module) -> torch.memory_format:
        return torch.channels_last  # in which stages send each other their maps

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        self._check_parts(batch_size, microbatches=self.microbatches, accumulate=accumulate)


class PlacedStage(Placed):
    """This rank's `stage`; all other ranks of the mesh's `group` axis have theirs, and the last one has the logits."""

    def __init__(self, strategy: PipelineParallel, stage: Stage, model: nn.Module):
        super().__init__(strategy, model)
        self.stage = stage
        self.group = self.mesh.get_group("group")
        self.rank, self.ranks = self.group.rank(), self.group.size()
        # Of what stages send each other; images and logits have the strategy's dtype.
        self.sent_dtype = torch.bfloat16 if strategy.precision == "bf16" else strategy.dtype
        self.schedules: dict[int, ScheduleGPipe | Schedule1F1B] = {}

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.ranks - 1

    def forward_backward(self, images: Tensor, labels: Tensor, loss: Loss, accumulate: int = 1) -> None:
        """As `Placed` has it. The first rank alone reads the images, the last the labels; all need their number."""
        microbatches = self.strategy.microbatches
        self.loss = lambda logits, labels: loss(logits, labels) / (accumulate * microbatches)
        for x, y in zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True):
            given = (_channels_inmost(x),) if self.is_first else ()
            self._schedule(len(x) // microbatches).step(
                *given, target=y if self.is_last else None, return_outputs=False
            )

    def clip_(self, max_norm: float) -> Tensor:
        return clip_gradients_(self.model, self.mesh, max_norm, stages=True)

    def total(self, sums: Tensor) -> list[float]:
        return self._sum_over(sums, "group")  # the last stage's; those of the others are zero

    @torch.no_grad()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor | None:
        """The logits of any number of images on the last rank, None on the others; `model` is this rank's stage."""
        if self.is_first:
            x = _channels_inmost(images)
        else:
            x = torch.empty_like(self._received(len(images)), device=self.device)
            dist.recv(x, group=self.group, group_src=self.rank - 1)
        y = _Ends(model, self)(x)
        if self.is_last:
            return y
        dist.send(y, group=self.group, group_dst=self.rank + 1)
        return None

    def _schedule(self, size: int) -> ScheduleGPipe | Schedule1F1B:
        """The schedule of microbatches of `size` images: shapes are agreed on beforehand, and nothing is probed."""
        if size not in self.schedules:
            ends = _Ends(self.stage.network, self)
            stage = PipelineStage(
                ends,
                self.rank,
                self.ranks,
                self.device,
                input_args=self._received(size),
                output_args=self._sent(size),
                group=self.group,
            )
            schedule = SCHEDULES[self.strategy.parallel]
            self.schedules[size] = schedule(
                stage, self.strategy.microbatches, lambda *pair: self.loss(*pair), scale_grads=False
            )
        return self.schedules[size]

    def _received(self, size: int) -> Tensor:
        """A meta tensor like what this stage's network is given for `size` images."""
        received = torch.empty(size, *self.stage.received, device="meta")
        if self.is_first:
            return _channels_inmost(received.to(self.strategy.dtype))
        return _channels_inmost(received.to(self.sent_dtype)).requires_grad_()

    def _sent(self, size: int) -> Tensor:
        """A meta tensor like what this stage gives for `size` images."""
        sent = torch.empty(size, *self.stage.sent, device="meta")
        if self.is_last:
            return sent.to(self.strategy.dtype)
        return _channels_inmost(sent.to(self.sent_dtype)).requires_grad_()


class _Ends(nn.Module):
    """A stage's network between what it receives and what it sends: contiguous, channels inmost, of a fixed type."""

    def __init__(self, network: nn.Module, placed: PlacedStage):
        super().__init__()
        self.network = network
        self.last, self.precision = placed.is_last, placed.strategy.precision
        self.dtype = placed.strategy.dtype if self.last else placed.sent_dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.permute(0, 3, 1, 2)
        with autocast(x.device, self.precision):
            y = self.network(x)
        # Logits too: autocast has their loss computed in float32 anyway.
        return _contiguous(y.to(self.dtype)) if self.last else _channels_inmost(y.to(self.dtype))


def _channels_inmost(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as `[B, H, W, C]`, so that channels_last maps need no copy; contiguous whatever the shape."""
    return _contiguous(x.permute(0, 2, 3, 1) if x.dim() == 4 else x)


def _contiguous(x: Tensor) -> Tensor:
    """x in the strides of a new tensor: those of sizes 1 too, which is_contiguous() and contiguous() leave open."""
    return x.reshape(-1).view(x.shape)
