"""The ways to train on P ranks, each as one training step on a fixed batch: the one place that builds them.

    group              channel groups over the ranks: GC-2L, or plain group convolution
    channel            the exact dense convolution, its filters over the ranks, every input channel gathered
    ddp                replicas, each with its share of the batch
    fsdp               as ddp, and each keeps its share of the parameters
    naive gpipe 1f1b   layers over the ranks, by schedule
    alone              no strategy: the whole network on this rank, which the others are compared with

Each is what `twolevel train` runs: `twolevel.training.step.make_step`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

from twolevel import models
from twolevel.distributed.simulation import FAKE
from twolevel.errors import UserError, unknown
from twolevel.training.config import OptimiserConfig
from twolevel.training.step import make_step

ALONE = "alone"
"""Not a strategy: one rank, with everything."""

STRATEGIES = ("group", "channel", "ddp", "fsdp", "naive", "gpipe", "1f1b")

OVER_DATA = ("ddp", "fsdp")
"""Strategies whose ranks see different images; the ranks of all others see the same."""

AXES = ("data", "group")

# A small rate: the batch never changes, and once it is learnt gradients would be denormal numbers.
RULE = OptimiserConfig(learning_rate=1e-3, weight_decay=5e-4)


@dataclass
class Training:
    """A training step of one strategy on this rank's share of a batch; calling it takes the step."""

    step: Callable[[], Tensor]
    model: nn.Module
    optimiser: torch.optim.Optimizer

    def __call__(self) -> Tensor:
        """[sum of losses, number right, number of images] of the logits that this rank has."""
        return self.step()

    def held_bytes(self) -> dict[str, int]:
        """Bytes of this rank's parameters and of its optimiser's state; to be asked after a step."""
        states = [value for state in self.optimiser.state.values() for value in state.values()]
        return {
            "parameters": sum(map(_bytes, self.model.parameters())),
            "optimiser": sum(_bytes(value) for value in states if isinstance(value, Tensor)),
        }


def build(
    strategy: str,
    model: str,
    *,
    conv: str,
    groups: int,
    batch: int,
    mesh: DeviceMesh,
    exchange: str = "group",
    device: str = "cpu",
) -> Training:
    """The training step of `strategy` for this rank of `mesh`, as `mesh_of` makes it; every rank must call this.

    Args:
        batch: images of a step over all ranks together.
        exchange: what carries the representatives of `group` and the activations of `channel`, as in `parallelize`.

    In float32 on the CPU, on a GPU under bfloat16 autocast.

    Raises:
        UserError: an unknown strategy, or one that cannot run this network on these ranks.
    """
    if strategy not in (*STRATEGIES, ALONE):
        raise unknown("strategy", strategy, STRATEGIES)
    replicas = mesh["data"].size()
    if batch % replicas:
        raise UserError(
            f"batch={batch} does not divide over {replicas} replicas; use a multiple of {replicas}"
        )
    images, labels = fixed_batch(model, batch // replicas, device)
    step = make_step(
        model,
        mesh,
        device,
        parallel="group" if strategy in ("ddp", ALONE) else strategy,
        conv=conv,
        groups=groups,
        image_shape=tuple(images.shape[1:]),
        exchange=exchange,
        precision="bf16" if device == "cuda" else "float32",
        optimiser=RULE,
    )
    return Training(lambda: step(images, labels), step.placed.model, step.optimiser)


def fixed_batch(model: str, images: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Noise of the size that the network takes, and labels; the same on every rank."""
    size = models.image_size(model)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.randint(10, (images,), generator=generator)
    return pixels.to(device, memory_format=torch.channels_last), labels.to(device)


def mesh_of(strategy: str, *, crosses: bool = True, device: str = "cpu") -> DeviceMesh:
    """All ranks of the world along the axis that the strategy takes; for `alone` a mesh of each rank's own.

    With crosses=False every rank has the shapes and computes what it would, but sends nothing and waits for no
    other: its collectives return at once, with copies of its own values. Every rank must call this.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    shape = (ranks, 1) if strategy in OVER_DATA else (1, ranks)
    if crosses and strategy != ALONE:
        return init_device_mesh(device, shape, mesh_dim_names=AXES)
    lone = [dist.new_group([r], backend=FAKE) for r in range(ranks)][rank]
    if strategy == ALONE:
        return DeviceMesh.from_group([lone, lone], device, mesh=torch.tensor([[rank]]), mesh_dim_names=AXES)
    every = dist.new_group(range(ranks), backend=FAKE)
    axes = [every if size > 1 else lone for size in shape]
    order = torch.arange(ranks).view(shape)
    return DeviceMesh.from_group(axes, device, mesh=order, mesh_dim_names=AXES)


def _bytes(tensor: Tensor) -> int:
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a rank's part of a sharded one
    return own.numel() * own.element_size()
