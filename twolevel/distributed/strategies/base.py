"""What every way to share a network over ranks is: a strategy, and the part of a network that it places on a rank."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from twolevel.data.split import EvalSplit
from twolevel.distributed.agreement import together
from twolevel.distributed.gradients import clip_gradients_
from twolevel.errors import UserError
from twolevel.nn import initialize
from twolevel.nn.structure import memory_format

EVAL_BATCH = 500
"""Images that a rank tests at a time."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""The mean loss of (logits, labels) over some images, whose gradient is taken."""


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """The context in which a network of this precision computes: bfloat16 where that is bf16."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


class Strategy(ABC):
    """How the ranks of a mesh share a network, before there is one. `precision`: float32, bf16 (autocast) or float64.

    `parallel` is the name in `twolevel.settings.PARALLELS`; `microbatches` the parts in which a batch passes through.
    """

    parallel: str
    microbatches: int = 1

    def __init__(self, mesh: DeviceMesh, device: torch.device | str, *, precision: str = "float32"):
        self.mesh, self.device, self.precision = mesh, torch.device(device), precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32

    def place(
        self,
        network: nn.Module,
        seed: int,
        image_shape: tuple[int, int, int],
        *,
        sync_batch_norm: bool = False,
        compile: bool = False,
    ) -> "Placed":
        """This rank's part of a network of the meta device, drawn from `seed`; no rank builds the whole.

        With `compile` its forward runs through torch.compile. Every rank must call this; it fails on all or on none.
        """
        placed = self._place(network, seed, image_shape, sync_batch_norm)
        if compile:
            placed.compile_()
        return placed

    @abstractmethod
    def _place(
        self, network: nn.Module, seed: int, image_shape: tuple[int, int, int], sync_batch_norm: bool
    ) -> "Placed":
        """As `place`, not compiled."""

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Raise UserError where a batch does not divide into the parts in which it is computed."""
        self._check_parts(batch_size, data_parallel=self.mesh["data"].size(), accumulate=accumulate)

    @staticmethod
    def _check_parts(batch_size: int, **parts: int) -> None:
        number = 1
        for part in parts.values():
            number *= part
        if batch_size % number:
            named = " x ".join(f"{name}={part}" for name, part in parts.items())
            raise UserError(f"batch_size={batch_size} does not divide by {named}; use a multiple of {number}")

    def _draw(self, network: nn.Module, seed: int) -> nn.Module:
        """Memory and values for the part of a network that is left on the meta device."""
        with together():  # the device may be the meta device
            initialize(network, seed, self.device)
        return self._in_memory_format(network)

    def _in_memory_format(self, network: nn.Module) -> nn.Module:
        return network.to(self.dtype).to(memory_format=self.memory_format(network))

    def memory_format(self, network: nn.Module) -> torch.memory_format:
        """In which a part of a network is given its images."""
        return memory_format(network, self.device) if self.precision == "float32" else torch.channels_last

    def __str__(self) -> str:
        return f"{self.mesh['data'].size()} data x {self.mesh['group'].size()} {self.parallel} ranks"


class Placed:
    """This rank's part of a network, ready to train and to test: `model`, as a strategy placed it.

    Every rank must make the same calls. This class is right for a rank that computes logits by calling `network`.
    """

    def __init__(self, strategy: Strategy, model: nn.Module):
        self.strategy, self.model = strategy, model
        self.mesh, self.device = strategy.mesh, strategy.device
        self.memory_format = strategy.memory_format(model)

    def compile_(self) -> None:
        """Have the forward of `model` run through torch.compile."""
        self.model.compile()

    @property
    def network(self) -> nn.Module:
        """What a step calls: `model`, or what adds the exchange of gradients to it."""
        return self.model

    def forward_backward(self, images: Tensor, labels: Tensor, loss: Loss, accumulate: int = 1) -> None:
        """Add the gradients of `loss` over the whole batch, of which this rank has its share, to the parameters'.

        The batch is computed in `accumulate` equal parts one after the other. `loss` is called for each part, on the
        ranks that have logits, and divided by their number here.
        """
        images = images.contiguous(memory_format=self.memory_format)
        chunks = zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)
        for index, (x, y) in enumerate(chunks, start=1):
            with self._synchronised(last_part=index == accumulate):
                with autocast(self.device, self.strategy.precision):
                    logits = self.network(x)
                (loss(logits, y) / accumulate).backward()

    def _synchronised(self, *, last_part: bool) -> AbstractContextManager[None]:
        """Replicas add their gradients up once a step, with its last part."""
        return nullcontext()

    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradients of the whole network down to this norm; returns their norm before, a scalar."""
        return clip_gradients_(self.model, self.mesh, max_norm)

    @torch.no_grad()
    def all_finite(self, sums: Tensor) -> bool:
        """Whether `sums` and the gradients of every rank are finite; waits for the device."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        finite = torch.stack([part.isfinite().all() for part in (sums, *own)]).all().float()
        if dist.get_world_size() > 1:
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor | None:
        """The whole network's logits on the ranks that have them; `model` is `self.model` or a copy, as its average."""
        with autocast(self.device, self.strategy.precision):
            return model(images.contiguous(memory_format=self.memory_format))

    def eval_batches(self, model: nn.Module, test: EvalSplit) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's share of the test images; `logits` must be called for each batch."""
        yield from test.eval_batches(EVAL_BATCH)

    def end_forwards(self, model: nn.Module) -> None:
        """Called after the last of some `logits`, which have no backward."""

    def total(self, sums: Tensor) -> list[float]:
        """Sums over the logits that ranks have, summed over all images, on the host of every rank."""
        return self._sum_over(sums, "data")

    def _sum_over(self, sums: Tensor, axis: str) -> list[float]:
        if self.mesh[axis].size() > 1:
            sums = sums.clone()
            dist.all_reduce(sums, group=self.mesh.get_group(axis))
        return sums.tolist()

    def num_parameters(self) -> int:
        """The number of parameters that this rank keeps."""
        return sum(parameter.numel() for parameter in self.model.parameters())
