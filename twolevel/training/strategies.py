"""How ranks share a network, one class for each `--parallel`. The loop calls one of them and does not know which."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from twolevel.data.split import EvalSplit
from twolevel.distributed import (
    clip_gradients_,
    clip_sharded_gradients_,
    clip_staged_gradients_,
    parallelize,
    replicate,
    shard_parameters,
    split_channels,
)
from twolevel.distributed.agreement import together
from twolevel.distributed.pipeline import Pipeline
from twolevel.distributed.stages import cut_stages
from twolevel.errors import UserError
from twolevel.nn import initialize
from twolevel.training.config import MeshConfig
from twolevel.training.evaluate import EVAL_BATCH, autocast

Loss = Callable[[Tensor, Tensor], Tensor]


class Strategy:
    """parallel=group: replicas along `data`, each cut by channel group along `group`."""

    microbatches = 1

    def __init__(self, config: MeshConfig, mesh: DeviceMesh, device: torch.device, precision: str):
        self.config, self.mesh, self.device, self.precision = config, mesh, device, precision
        self.dtype = torch.float64 if precision == "float64" else torch.float32

    def place(
        self,
        network: nn.Module,
        seed: int,
        image_shape: tuple[int, int, int],
        *,
        sync_batch_norm: bool = False,
    ) -> nn.Module:
        """This rank's part of a network of the meta device, drawn from `seed`; no rank builds the whole.

        Every rank must call this; it fails on all or on none.
        """
        exchange = {"exchange": self.config.exchange, "timeout_s": self.config.timeout}
        parallelize(network, self.mesh, sync_batch_norm=sync_batch_norm, **exchange)
        return self._draw(network, seed)

    def _draw(self, network: nn.Module, seed: int) -> nn.Module:
        with together(self.device):
            initialize(network, seed, self.device)
        return network.to(self.dtype).to(memory_format=torch.channels_last)

    def compile_(self, model: nn.Module) -> None:
        """Have the forward of what `place` gave run through torch.compile; before `connect`."""
        model.compile()

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

    def connect(self, model: nn.Module, loss: Loss, accumulate: int) -> None:
        """Make ready to train what `place` gave.

        `loss` of (logits, labels) is called for each part of a batch, on the ranks that have the logits; its gradients
        add up to those of the batch. It divides by the number of calls, which is `self.parts`.
        """
        self.loss, self.accumulate, self.parts = loss, accumulate, accumulate
        self.network = replicate(model, self.mesh)

    def forward_backward(self, images: Tensor, labels: Tensor) -> None:
        """Leave the gradients of the whole batch, of which this rank is given its share, in the parameters."""
        chunks = zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True)
        for index, (x, y) in enumerate(chunks, start=1):
            with self._synchronised(index == self.accumulate):
                with autocast(self.device, self.precision):
                    logits = self.network(x)
                self.loss(logits, y).backward()

    def _synchronised(self, last_part: bool) -> AbstractContextManager:
        """Replicas add their gradients up once a step, with its last part."""
        if isinstance(self.network, DistributedDataParallel) and not last_part:
            return self.network.no_sync()
        return nullcontext()

    def clip_(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients of the whole network down to this norm; returns their norm before."""
        return clip_gradients_(model, self.mesh, max_norm)

    def eval_batches(self, model: nn.Module, test: EvalSplit) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This rank's share of the test images; `logits` must be called for each batch."""
        yield from test.eval_batches(EVAL_BATCH)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor | None:
        """What the whole network makes of images, on the ranks that have it. `model` is a part that `place` gave."""
        with autocast(self.device, self.precision):
            return model(images)

    def rest(self, model: nn.Module) -> None:
        """Called after the last of some `logits`, which have no backward."""

    def total(self, sums: Tensor) -> list[float]:
        """Sums over the logits that ranks have, summed over all images, on the host of every rank."""
        return self._over(sums, "data")

    def _over(self, sums: Tensor, axis: str) -> list[float]:
        if self.mesh[axis].size() > 1:
            sums = sums.clone()
            dist.all_reduce(sums, group=self.mesh.get_group(axis))
        return sums.tolist()

    def held(self, model: nn.Module) -> int:
        """The number of parameters that this rank keeps."""
        return sum(parameter.numel() for parameter in model.parameters())

    def __str__(self) -> str:
        return f"{self.mesh['data'].size()} data x {self.mesh['group'].size()} {self.config.parallel} ranks"


class Channels(Strategy):
    """parallel=channel: as group, of networks of dense convolutions, whose inputs are gathered."""

    def place(self, network, seed, image_shape, *, sync_batch_norm=False):
        exchange = {"exchange": self.config.exchange, "timeout_s": self.config.timeout}
        split_channels(
            network, self.mesh, seed=seed, device=self.device, sync_batch_norm=sync_batch_norm, **exchange
        )
        return network.to(self.dtype).to(memory_format=torch.channels_last)


class Sharded(Strategy):
    """parallel=fsdp: replicas whose parameters are kept in parts."""

    def place(self, network, seed, image_shape, *, sync_batch_norm=False):
        # fully_shard takes contiguous parameters: channels_last comes from the images alone.
        return shard_parameters(
            network,
            self.mesh,
            seed=seed,
            device=self.device,
            dtype=self.dtype,
            sync_batch_norm=sync_batch_norm,
        )

    def compile_(self, model):
        # Gathering ends a graph at each block. All blocks are one class, so that torch would take their sizes for
        # variable, and then fails to generate code (2.15, CPU).
        model.compile(dynamic=False)

    def connect(self, model, loss, accumulate):
        self.loss, self.accumulate, self.parts = loss, accumulate, accumulate
        self.network = model

    def _synchronised(self, last_part):
        self.network.set_requires_gradient_sync(last_part)
        return nullcontext()

    def clip_(self, model, max_norm):
        return clip_sharded_gradients_(model, max_norm)

    def eval_batches(self, model, test):
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
            self.rest(model)

    def rest(self, model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the outermost keeps its parameters whole for a backward that does not come

    def held(self, model):
        return sum(parameter.to_local().numel() for parameter in model.parameters())

    def __str__(self):
        return f"{self.mesh['data'].size()} fsdp ranks"


class Stages(Strategy):
    """parallel=naive, gpipe, 1f1b: each rank holds a part of the layers; the last one has the logits."""

    def place(self, network, seed, image_shape, *, sync_batch_norm=False):
        stage = cut_stages(network, self.mesh["group"].size(), image_shape)[self.mesh.get_local_rank("group")]
        self.pipeline = Pipeline(
            stage,
            self.mesh,
            self.device,
            schedule=self.config.parallel,
            microbatches=self.microbatches,
            loss=lambda logits, labels: self.loss(logits, labels),
            dtype=self.dtype,
            autocast=torch.bfloat16 if self.precision == "bf16" else None,
        )
        return self._draw(stage.network, seed)

    @property
    def microbatches(self) -> int:
        if self.config.parallel == "naive":
            return 1
        return self.config.microbatches or self.mesh["group"].size()

    def check_batch(self, batch_size, accumulate):
        self._check_parts(batch_size, microbatches=self.microbatches, accumulate=accumulate)

    def connect(self, model, loss, accumulate):
        self.loss, self.accumulate, self.parts = loss, accumulate, accumulate * self.microbatches

    def forward_backward(self, images, labels):
        for x, y in zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True):
            self.pipeline.forward_backward(x, y)

    def clip_(self, model, max_norm):
        return clip_staged_gradients_(model, self.mesh, max_norm)

    def logits(self, model, images):
        return self.pipeline.logits(model, images)

    def total(self, sums):
        return self._over(sums, "group")  # the last stage's; those of the others are zero


STRATEGIES: dict[str, type[Strategy]] = {"group": Strategy, "channel": Channels, "fsdp": Sharded}
STRATEGIES |= dict.fromkeys(("naive", "gpipe", "1f1b"), Stages)
