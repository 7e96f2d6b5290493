"""A training step as one CUDA graph: one launch a step, and nothing left for the host to do in it."""

import torch
from torch import Tensor

from twolevel.errors import UserError
from twolevel.training.config import TrainConfig
from twolevel.training.step import TrainStep

# Steps before the capture: memory, momentum, the choice of algorithms and kernels, NCCL's connections.
WARM_UP = 3


def check_capturable(config: TrainConfig, device: torch.device, backend: str) -> None:
    """Raise UserError where a step of this run cannot be captured."""
    why = None
    if device.type != "cuda":
        why = f"needs a GPU, and ranks compute on the {device.type}"
    elif config.mesh.parallel != "group" or config.mesh.data_parallel > 1:
        why = "takes parallel=group with one replica"
    elif "nccl" not in backend:
        why = f"takes the exchange of NCCL, not of {backend}"
    elif config.model.conv in ("dgc", "dgconv"):
        why = f"cannot follow conv={config.model.conv}, whose rule changes from step to step"
    elif config.optimiser.accumulate > 1:
        why = "takes accumulate=1"
    if why is not None:
        raise UserError(f"cuda_graph=True {why}; leave it out")


class GraphedStep:
    """`step(images, labels)` as `TrainStep` has it, replayed from its fourth call on.

    All batches have one shape. The learning rate lies on the device, so that replays follow it.
    """

    def __init__(self, step: TrainStep):
        self.step = step
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()
        for group in step.optimiser.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=step.placed.device)

    def set_rate(self, rate: float) -> None:
        for group in self.step.optimiser.param_groups:
            group["lr"].fill_(rate)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= WARM_UP:
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
