"""A training step as one CUDA graph: one launch a step, and nothing left for the host to do in it."""

import torch
from torch import Tensor

from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.training.config import TrainConfig
from twolevel.training.step import TrainStep

# Steps before the capture: memory, momentum, the choice of algorithms and kernels, NCCL's connections.
WARM_UP = 3
# DistributedDataParallel times its first ten steps with events that it reads, which no capture allows; so PyTorch,
# "CUDA semantics", usage with DistributedDataParallel.
WARM_UP_OF_REPLICAS = 11


def check_capturable(config: TrainConfig, world: World) -> None:
    """Raise UserError where a step of this run cannot be captured.

    A graph replays kernels and NCCL's collectives on the memory in which they were captured. So nothing in a step may
    be decided by the host (rules of DGC, DGConv and LGC), go by way of it (Gloo), or move to other memory (parameters
    of fsdp, activations between stages). Filters over ranks (channel) and parts of a batch (accumulate) have not been
    tried.
    """
    why = None
    if world.device.type != "cuda":
        why = f"needs a GPU, and ranks compute on the {world.device.type}"
    elif config.mesh.parallel != "group":
        why = f"takes parallel=group, not {config.mesh.parallel}"
    elif world.size > 1 and "nccl" not in world.backend and not world.simulated:
        why = f"takes the exchange of NCCL, not of {world.backend}, which goes by way of the host"
    elif config.model.conv in ("dgc", "dgconv", "lgc"):
        why = f"cannot follow conv={config.model.conv}, whose rule changes from step to step"
    elif config.optimiser.accumulate > 1:
        why = f"takes accumulate=1, not {config.optimiser.accumulate}"
    elif config.run.on_not_finite != "stop":
        why = f"takes on_not_finite=stop, not {config.run.on_not_finite}, for which the host looks at every step"
    if why is not None:
        raise UserError(f"cuda_graph=True {why}; leave it out")


class GraphedStep:
    """`step(images, labels)` as `TrainStep` has it, replayed once it is warm.

    All batches have one shape. The learning rate lies on the device, so that replays follow it. Every step runs on one
    stream, the one of the capture: the gradients of replicas are bound to the stream on which they were first made.
    """

    def __init__(self, step: TrainStep):
        self.step = step
        replicas = step.placed.mesh["data"].size()
        self.warm_up = WARM_UP if replicas == 1 else WARM_UP_OF_REPLICAS
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()
        for group in step.optimiser.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=step.placed.device)

    def set_rate(self, rate: float) -> None:
        for group in self.step.optimiser.param_groups:
            group["lr"].fill_(rate * group["scale"])

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.warm_up:
            # As capture asks: what runs before it runs on a stream of its own.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                sums = self.step(images, labels)
            torch.cuda.current_stream().wait_stream(self.stream)
            return sums
        if self.graph is None:
            self.images, self.labels = images.clone(), labels.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.sums = self.step(self.images, self.labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.sums.clone()
